"""What cannot be built, fails or is wrong on a device is left to PyTorch on the host."""

import copy
import gc
import warnings
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.yolov7.networks import SIZE, detect, graph_network, run_by, sure
from yolov7 import create_model
from yolov7.checkpoint import load_model
from yolov7.engine.choose import Runtime, open_network
from yolov7.engine.eager import fold_on
from yolov7.engine.frames import HostFrames, to_input
from yolov7.engine.graph import captured, guard
from yolov7.engine.graph import network as graph_module
from yolov7.engine.graph.calibrate import calibrate
from yolov7.engine.graph.network import CapturedFrames, GraphNetwork
from yolov7.engine.graph.planned import PlannedNetwork
from yolov7.errors import UserError
from yolov7.kernels.letterbox import letterbox as letterbox_kernel
from yolov7.kernels.nms import Detections
from yolov7.kernels.reparam import reparam
from yolov7.kernels.runtime import PRECISIONS
from yolov7.letterbox import Image, letterbox, letterbox_geometry
from yolov7.suppression import Suppression

# what cannot be built falls back


def broken(*_: object, **__: object) -> Any:
    raise RuntimeError("ptxas: no such file\nand more lines")


FAULTS: dict[str, tuple[object, str]] = {
    "plan": (graph_module, "PlannedNetwork"),
    "capture": (graph_module, "FramePipeline"),
    "launch": (PlannedNetwork, "run"),
    "decoding": (PlannedNetwork, "decode"),
}


@pytest.mark.parametrize("place", FAULTS)
def test_what_fails_is_one_warning_and_eager_from_then_on(
    place: str, images: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = detect(open_network(Runtime(device="cpu")), images, Suppression())
    network = graph_network(required=False)
    monkeypatch.setattr(*FAULTS[place], broken)
    with pytest.warns(UserWarning, match="left for eager: RuntimeError: ptxas: no such file$") as w:
        found = detect(network, images, Suppression())
    assert len(w) == 1
    assert network.engine == "eager"
    sure(found, expected)


@pytest.mark.parametrize("place", FAULTS)
def test_what_fails_is_an_error_of_one_line_where_the_graph_is_required(
    place: str, images: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*FAULTS[place], broken)
    with pytest.raises(UserError, match="engine graph: RuntimeError: ptxas: no such file: use"):
        detect(graph_network(required=True), images, Suppression())


def test_no_memory_in_a_forward_alone_falls_back_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError("no memory")

    x = torch.rand(1, 3, 64, 64)
    network = graph_network(required=False)
    monkeypatch.setattr(graph_module, "PlannedNetwork", full)
    with pytest.warns(UserWarning, match="OutOfMemoryError: no memory"):
        decoded = network(x)
    torch.testing.assert_close(decoded, open_network(Runtime(device="cpu"))(x), rtol=1e-3, atol=0.1)


@pytest.mark.parametrize("what", ["boxes", "objectness", "NaN", "suppression", "letterbox"])
def test_a_first_batch_that_is_wrong_is_found(
    what: str, images: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a GPU every plan is checked; here a guard is planted, and a fault."""
    real = PlannedNetwork.decode

    def decode(self: PlannedNetwork, conf: float | None = None) -> tuple[Tensor, Tensor]:
        rows, counts = real(self, conf)
        if what == "boxes":
            rows[..., 2] *= 1.1
        elif what == "objectness":
            rows[..., 4] *= 0.95
        elif what == "NaN":
            rows[:, 7, 5] = float("nan")
        elif conf is not None:  # what is read back differs from what the dense decoding gives
            rows[..., 4] *= 0.5
        return rows, counts

    expected = detect(open_network(Runtime(device="cpu")), images, Suppression())
    monkeypatch.setattr(PlannedNetwork, "decode", decode)
    if what == "letterbox":
        real_letterbox = letterbox_kernel

        def mirrored(pixels: Tensor, table: Tensor, x: Tensor) -> None:
            real_letterbox(pixels, table, x)
            x.copy_(x.flip(1))  # BGR

        monkeypatch.setattr(captured, "letterbox", mirrored)
    network = graph_network(required=False, guarded=True)
    reason = {"suppression": "references", "letterbox": "OpenCV's"}.get(what, "off PyTorch's by")
    with pytest.warns(UserWarning, match=reason):
        found = detect(network, images, Suppression())
    assert network.engine == "eager"
    sure(found, expected)
    with pytest.raises(UserError, match=f"{reason}.*: use --engine eager"):
        detect(graph_network(required=True, guarded=True), images, Suppression())


PICTURES: dict[str, Callable[[Image], Image]] = {
    "cells": lambda image: image,
    "black": np.zeros_like,
    "grey": lambda image: np.full_like(image, 114),
    "noise": lambda image: np.random.default_rng(0).integers(0, 256, image.shape, np.uint8),
}


@pytest.mark.parametrize("picture", PICTURES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_alone_stays_below_half_of_what_is_allowed(
    precision: str, picture: str, images: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is in the picture."""
    where = letterbox_geometry(images[0].shape[:2], SIZE, auto=True)
    cells = to_input([letterbox(images[0], where)], torch.device("cpu"), torch.float32)
    model = load_model()
    if (dtype := PRECISIONS[precision]).itemsize == 1:
        model.ranges[precision] = calibrate(copy.deepcopy(model).fuse(), [cells], dtype)
    network = GraphNetwork(model, torch.device("cpu"), precision, required=True)
    exact = open_network(Runtime(device="cpu", precision="fp32"))
    image = letterbox(PICTURES[picture](images[0]), where)
    x = to_input([image], network.device, network.dtype)
    halved = {name: (a / 2, b / 2) for name, (a, b) in guard.TOLERANCE.items()}
    monkeypatch.setattr(guard, "TOLERANCE", halved)
    size = (x.shape[2], x.shape[3])
    head = network._model.head
    assert not guard.why_wrong(network(x), exact(x.float()), head, size, precision)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8", "int8"])
@pytest.mark.parametrize("level", [0, 2])
def test_boxes_of_one_level_that_are_a_cell_off_are_seen(precision: str, level: int) -> None:
    head = load_model().head
    raw = [torch.randn(1, 3, s, s, 8) for s in (160, 80, 40)]
    right, wrong = head.decode(raw), head.decode(raw)
    start = sum(3 * s * s for s in (160, 80, 40)[:level])
    count = 3 * (160, 80, 40)[level] ** 2
    wrong[:, start : start + count, 0] += head.strides[level]
    assert not guard.why_wrong(right, right, head, (1280, 1280), precision)
    said = guard.why_wrong(wrong, right, head, (1280, 1280), precision)
    assert said.startswith(f"the boxes of level {level} are off")


def test_the_guard_looks_once_at_every_plan(
    images: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    network = GraphNetwork(load_model(), torch.device("cpu"), "fp32", required=True)
    network.guarded = True
    compared: list[Tensor] = []
    monkeypatch.setattr(network, "_compare", lambda decoded, _: compared.append(decoded))
    turned = np.ascontiguousarray(np.rot90(images[0]))
    detect(network, [images[0], images[1], turned, images[2], turned], Suppression())
    assert len(compared) == 2


def test_an_empty_frame_proves_nothing(
    images: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does a forward."""
    black = np.zeros_like(images[0])
    graph = CapturedFrames(graph_network(required=False, guarded=True), Suppression(), 1)
    host = on_a_gpu(Suppression().on(torch.device("cpu")))
    ways: list[HostFrames | CapturedFrames] = [graph, host]
    where = letterbox_geometry(black.shape[:2], SIZE, auto=True)
    for way in ways:
        way.submit([way.prepare(black, where)], [where]).wait()

    def nothing(rows: Tensor, *_: object, **__: object) -> Detections:
        found = Suppression().on(torch.device("cpu"))(rows)
        return found._replace(counts=found.counts * 0)

    host._suppress_there = nothing
    ((_, plan),) = graph.network._plans.items()
    ((_, pipeline),) = plan.pipelines.items()
    monkeypatch.setattr(pipeline, "_suppression", nothing)
    graph.network(torch.rand(1, 3, *where.shape))
    for way, reason in zip(ways, ("references", "other boxes than on the CPU"), strict=True):
        with pytest.warns(UserWarning, match=reason):
            found = way.submit([way.prepare(images[0], where)], [where]).wait()
        assert int(found.counts[0]) > 5


def test_after_a_fall_everything_goes_the_hosts_way(
    images: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Letterboxes are prepared ahead again and timed; what was prepared before is not lost."""
    network = graph_network(required=False)
    frames = CapturedFrames(network, Suppression(), 1)
    where = letterbox_geometry(images[0].shape[:2], SIZE, auto=True)
    before = frames.prepare(images[0], where)
    assert before is images[0]
    monkeypatch.setattr(graph_module, "FramePipeline", broken)
    with pytest.warns(UserWarning, match="ptxas"):
        first = frames.submit([before], [where]).wait()
    after = frames.prepare(images[0], where)
    assert after.shape[:2] == where.shape
    assert frames.in_flight == 0
    second = frames.submit([after], [where]).wait()
    third = frames.submit([before], [where]).wait()
    assert torch.equal(first.boxes, second.boxes)
    assert torch.equal(first.boxes, third.boxes)


def test_the_memory_of_a_plan_that_failed_is_free_when_eager_runs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held: list[weakref.ref[PlannedNetwork]] = []
    alive: list[bool] = []

    def run(self: PlannedNetwork, *_: object) -> None:
        held.append(weakref.ref(self))
        raise torch.OutOfMemoryError("no memory")

    network = graph_network(required=False)
    forward = network._forward

    def eager(x: Tensor) -> Tensor:
        gc.collect()
        alive.append(held[0]() is not None)
        return forward(x)

    monkeypatch.setattr(PlannedNetwork, "run", run)
    network._forward = eager
    with pytest.warns(UserWarning, match="no memory"):
        network(torch.rand(1, 3, 64, 64))
    assert alive == [False]


def test_plans_make_room_for_one_another(monkeypatch: pytest.MonkeyPatch) -> None:
    network = graph_network(required=True)
    network(torch.rand(1, 3, 64, 64))

    def planned(*arguments: Any, **options: Any) -> PlannedNetwork:
        if network._plans:
            raise torch.OutOfMemoryError("no memory")
        return PlannedNetwork(*arguments, **options)

    monkeypatch.setattr(graph_module, "PlannedNetwork", planned)
    network(torch.rand(1, 3, 64, 96))
    assert list(network._plans) == [(1, 64, 96)]


def test_a_plan_keeps_few_pipelines(images: list[Image]) -> None:
    network = graph_network(required=True)
    where = letterbox_geometry(images[0].shape[:2], 64, auto=True)
    for conf in (0.1, 0.2, 0.3, 0.4):
        CapturedFrames(network, Suppression(conf=conf), 1).submit([images[0]], [where]).wait()
    ((_, plan),) = network._plans.items()
    assert [s.conf for s in plan.pipelines] == [0.3, 0.4]


def test_users_mistakes_do_not_cost_the_engine(images: list[Image]) -> None:
    network = graph_network(required=False)
    with pytest.raises(ValueError, match="in multiples of 32"):
        network(torch.rand(1, 3, 33, 33))
    where = letterbox_geometry(images[0].shape[:2], 64, auto=True)
    with pytest.raises(ValueError, match="2 images and 2 letterboxes for a batch of 1"):
        CapturedFrames(network, Suppression(), 1).submit(images[:2], [where] * 2)
    kept = Suppression(classes=[1])  # type: ignore[arg-type]  # a list, as users write it
    CapturedFrames(network, kept, 1).submit(images[:1], [where]).wait()
    assert network.engine == "graph"


# suppression on a GPU, by a stand-in


def on_a_gpu(suppress: Callable[..., Detections]) -> HostFrames:
    network = open_network(Runtime(device="cpu"))
    frames = HostFrames(network, Suppression())
    frames._kernels, frames._suppress_there = True, suppress
    return frames


def test_suppression_that_fails_or_is_wrong_is_left_to_the_cpu(images: list[Image]) -> None:
    right = Suppression().on(torch.device("cpu"))
    expected = detect(open_network(Runtime(device="cpu")), images, Suppression())

    def moved(decoded: Tensor, **frames: Tensor) -> Detections:
        found = right(decoded, **frames)
        return found._replace(boxes=found.boxes + 1)

    for body, reason in ((broken, "ptxas"), (moved, "other boxes than on the CPU")):
        frames = on_a_gpu(body)
        with pytest.warns(UserWarning, match=reason) as warned:
            found = run_by(frames, images)
        assert len(warned) == 1
        sure(found, expected)
    frames = on_a_gpu(right)
    sure(run_by(frames, images[:1]), expected[:1])
    frames._suppress = broken  # after the first batch nothing is compared any more
    sure(run_by(frames, images), expected)


def test_frames_that_were_prepared_before_a_failure_go_the_cpus_way(
    images: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors of a whole window wait on the GPU when its first batch fails."""
    monkeypatch.setattr("yolov7.engine.frames.letterbox_on_device", broken)
    host = on_a_gpu(Suppression().on(torch.device("cpu")))
    where = letterbox_geometry(images[0].shape[:2], SIZE, auto=True)
    frame = torch.from_numpy(images[0])
    with pytest.warns(UserWarning, match="ptxas") as warned:
        found = [host.submit([frame], [where]).wait() for _ in range(3)]
    assert len(warned) == 1
    assert all(torch.equal(one.boxes, found[0].boxes) for one in found)


@pytest.mark.parametrize("fault", ["none", "raises", "wrong"])
def test_folding_that_fails_or_is_wrong_is_left_to_the_cpu(
    fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RepConv has two kinds of branches, a convolution one: kernels of 1x1 and 3x3."""
    torch.manual_seed(0)
    model = create_model("yolov7", 3, form="training", width=0.125)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]  # it has one
    expected = copy.deepcopy(model).fuse().state_dict()
    real, calls = reparam, count()

    def planted(*branches: Any) -> Any:
        if fault == "raises":
            broken()
        weight, bias = real(*branches)
        return (weight * 1.001 if next(calls) == 4 else weight), bias  # of the third block, there

    with monkeypatch.context() as patch:
        patch.setattr("yolov7.blocks.reparam", planted if fault != "none" else real)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fold_on(model, torch.device("cpu"))
    reasons = {"none": [], "raises": ["ptxas"], "wrong": ["other weights than on the CPU"]}[fault]
    assert len(caught) == len(reasons)
    for warning, reason in zip(caught, reasons, strict=True):
        assert reason in str(warning.message)
    for name, tensor in model.fuse().state_dict().items():
        assert torch.equal(tensor, expected[name]), name
