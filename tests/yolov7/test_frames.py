"""The one way from frames to boxes: both forms of it, and what happens where one fails."""

import copy
import gc
import subprocess
import sys
import threading
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.yolov7.data_sets import sample
from tests.yolov7.networks import StandIn
from yolov7 import Detector, create_model, items
from yolov7.checkpoint import load_model
from yolov7.dataset import Dataset, load_data
from yolov7.engine.choose import Runtime, fit, open_frames, open_network
from yolov7.engine.eager import fold_on
from yolov7.engine.faults import require_living_device
from yolov7.engine.frames import Found, Frames, HostFrames, to_input
from yolov7.engine.graph import captured, guard
from yolov7.engine.graph import network as graph_module
from yolov7.engine.graph.calibrate import calibrate
from yolov7.engine.graph.network import CapturedFrames, GraphNetwork
from yolov7.engine.graph.planned import PlannedNetwork
from yolov7.errors import UserError
from yolov7.evaluate import Settings, evaluate, predict
from yolov7.evaluate.run import EVERYTHING
from yolov7.export import Settings as ExportSettings
from yolov7.export import export
from yolov7.images import read_image
from yolov7.kernels.letterbox import letterbox as letterbox_kernel
from yolov7.kernels.nms import Detections
from yolov7.kernels.reparam import reparam
from yolov7.letterbox import Image, letterbox, letterbox_geometry
from yolov7.results import Results
from yolov7.sources import Source
from yolov7.suppression import Suppression

SAMPLES = sorted(Path(str(files("yolov7.assets") / "images")).glob("*.jpg"))
SIZE = 160  # enough for cells to be found, and fast


@pytest.fixture(scope="module")
def images() -> list[Image]:
    return [read_image(path) for path in SAMPLES]


def graph_network(*, required: bool, guarded: bool = False) -> GraphNetwork:
    network = GraphNetwork(load_model(), torch.device("cpu"), "fp32", required=required)
    network.guarded = guarded
    return network


def detect(network: Any, images: list[Image], suppression: Suppression) -> list[Tensor]:
    """Boxes [n, 6] of each image by whatever way suits the network."""
    return run_by(open_frames(network, suppression, 1), images)


def run_by(frames: Frames, images: list[Image]) -> list[Tensor]:
    found = []
    for image in images:
        where = letterbox_geometry(image.shape[:2], SIZE, auto=True)
        ((boxes, _),) = frames.submit([frames.prepare(image, where)], [where]).wait().rows()
        found.append(boxes)
    return found


def data_set(images: list[Image]) -> Dataset:
    """The samples, each labelled with what the demo weights are sure of."""
    samples = []
    results = Detector(device="cpu", conf=0.6)(images)
    for index, (path, result) in enumerate(zip(SAMPLES, results, strict=True)):
        boxes, classes = result.boxes.xyxy.tolist(), result.boxes.cls.tolist()
        size = (result.image.shape[0], result.image.shape[1])
        samples.append(sample(boxes, classes, image_id=index, path=path, size=size))
    return Dataset(samples, ["RBC", "WBC", "Platelets"], [0, 1, 2])


def by_the_host(network: Any) -> StandIn:
    """A network whose engine the door does not see: frames go the host's way."""
    return StandIn(network, network.names)


def sure(found: list[Tensor], expected: list[Tensor]) -> None:
    for boxes, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(boxes, wanted, rtol=1e-4, atol=1e-2)


# val is predict


def same_detections(network: Any, dataset: Dataset) -> None:
    """Bit for bit, at the same thresholds, whatever else the two do."""
    kept = Suppression(conf=0.001, iou=0.65)
    settings = Settings(imgsz=SIZE, batch=1, suppression=kept, preparation="letterbox")
    detector = Detector(device="cpu", imgsz=SIZE, conf=0.001, iou=0.65)
    detector.network, detector._frames = network, open_frames(network, kept)
    if network.one_shape:
        settings = replace(settings, preparation="square")
    predictions = predict(network, dataset, settings)
    results = detector([one.path for one in dataset.samples])
    assert sum(map(len, predictions.detections)) > 100
    for boxes, result in zip(predictions.detections, results, strict=True):
        assert np.array_equal(boxes, result.boxes.data.numpy())


@pytest.mark.parametrize("engine", ["eager", "graph", "compile", "onnxruntime"])
def test_val_detects_what_predict_detects(
    engine: str, images: list[Image], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runtime = Runtime(device="cpu", precision="fp32", engine=engine)
    if engine == "compile":
        monkeypatch.setattr(torch, "compile", lambda outputs, **_: outputs)
        monkeypatch.setattr("shutil.which", lambda name: name)
        monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    elif engine == "onnxruntime":
        pytest.importorskip("onnxruntime")
        path = tmp_path / "demo.onnx"
        export(load_model(), path, ExportSettings(imgsz=(SIZE, SIZE)))
        runtime = Runtime(weights=path, device="cpu")
    network = open_network(runtime)
    assert network.engine == engine
    same_detections(network, data_set(images))


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_val_detects_what_predict_detects_on_real_images(data_dir: Path, engine: str) -> None:
    dataset = load_data(data_dir / "blood-cells", "test")
    dataset = replace(dataset, samples=dataset.samples[::6])
    same_detections(open_network(Runtime(device="cpu", precision="fp32", engine=engine)), dataset)


@pytest.mark.parametrize("preparation", ["authors", "letterbox"])
def test_ap_by_the_graphs_own_way_is_that_of_the_hosts(
    preparation: Any, images: list[Image]
) -> None:
    """The letterbox, candidate and suppression operations beside OpenCV and dense decoding."""
    network = graph_network(required=True)
    dataset = data_set(images)
    settings = Settings(imgsz=SIZE, batch=3, preparation=preparation)
    own = evaluate(network, dataset, settings)
    host = evaluate(by_the_host(network), dataset, settings)
    assert "whole" in own.speed
    assert "nms" in host.speed
    assert 0.2 < own.stats["AP"] < 1
    assert own.stats == pytest.approx(host.stats, abs=1e-6)


def test_a_network_detects_after_it_was_measured(images: list[Image]) -> None:
    """Whatever mode its buffers were made in, others may write them."""
    network, dataset = graph_network(required=True), data_set(images)
    with torch.inference_mode():
        evaluate(network, dataset, Settings(imgsz=SIZE, batch=1, preparation="letterbox"))
    frames = open_frames(network, EVERYTHING, 1)
    where = letterbox_geometry(images[0].shape[:2], SIZE, auto=True)
    frames.submit([images[0]], [where]).wait()
    network(to_input([letterbox(images[0], where)], network.device, network.dtype))


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
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "fp8"])
def test_rounding_alone_stays_below_half_of_what_is_allowed(
    precision: str, picture: str, images: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever is in the picture."""
    where = letterbox_geometry(images[0].shape[:2], SIZE, auto=True)
    cells = to_input([letterbox(images[0], where)], torch.device("cpu"), torch.float32)
    model = load_model()
    if precision == "fp8":
        model.ranges = calibrate(copy.deepcopy(model).fuse(), [cells])
    network = GraphNetwork(model, torch.device("cpu"), precision, required=True)
    exact = open_network(Runtime(device="cpu", precision="fp32"))
    image = letterbox(PICTURES[picture](images[0]), where)
    x = to_input([image], network.device, network.dtype)
    halved = {name: (a / 2, b / 2) for name, (a, b) in guard.TOLERANCE.items()}
    monkeypatch.setattr(guard, "TOLERANCE", halved)
    size = (x.shape[2], x.shape[3])
    head = network._model.head
    assert not guard.why_wrong(network(x), exact(x.float()), head, size, precision)


@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp8"])
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

    def nothing(rows: Tensor, *_: object) -> Detections:
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

    def moved(decoded: Tensor) -> Detections:
        found = right(decoded)
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


# one cache of plans, one lock, first calls from several threads


def test_one_cache_holds_what_forwards_and_pipelines_use(images: list[Image]) -> None:
    network = graph_network(required=True)
    frames = CapturedFrames(network, Suppression(), 1)
    for columns in range(1, graph_module.PLANS + 2):
        network(torch.rand(1, 3, 32, 32 * columns))
        shape = (64 * columns, 64)
        image = np.ascontiguousarray(images[0][: shape[0], : shape[1]])
        where = letterbox_geometry(image.shape[:2], 32 * columns, auto=True)
        frames.submit([image], [where]).wait()
        assert len(network._plans) <= graph_module.PLANS


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_first_calls_from_several_threads(engine: str, images: list[Image]) -> None:
    expected = [
        result.boxes.data for result in Detector(device="cpu", imgsz=SIZE, engine=engine)(images)
    ]
    for _ in range(3):
        detector = Detector(device="cpu", imgsz=SIZE, engine=engine)
        start = threading.Barrier(4)

        def first(index: int, detector: Detector = detector, start: Any = start) -> Results:
            start.wait()
            return detector(images[index])[0]

        with ThreadPoolExecutor(4) as pool:
            sure([r.boxes.data for r in pool.map(first, range(4))], expected)


# nothing around the network


def test_an_array_starts_no_thread(images: list[Image], monkeypatch: pytest.MonkeyPatch) -> None:
    detector = Detector(device="cpu", imgsz=SIZE)
    detector(images[0])

    def start(self: threading.Thread) -> None:
        raise AssertionError("a thread was started")

    monkeypatch.setattr(threading.Thread, "start", start)
    assert len(detector(images[0])[0]) > 5
    assert len(detector(images)) == 4
    assert len(detector(torch.zeros(3, 64, 64, dtype=torch.uint8))) == 1


def test_frames_on_a_gpu_never_visit_the_host(
    images: list[Image], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a stand-in: tensors that say they are there, and that nobody may fetch."""
    fetched: list[int] = []
    monkeypatch.setattr(items, "_stays", lambda _: True)
    network = graph_network(required=True)
    detector = Detector(device="cpu", imgsz=SIZE)
    expected = detector(images[0])[0]
    detector.network, detector._frames = network, CapturedFrames(network, Suppression(), 1)
    rgb = torch.from_numpy(images[0][..., ::-1].copy()).permute(2, 0, 1)
    real = Tensor.numpy

    def numpy(self: Tensor) -> Any:
        fetched.append(self.numel())
        return real(self)

    monkeypatch.setattr(Tensor, "numpy", numpy)
    result = detector(rgb)[0]
    assert not fetched
    assert isinstance(result.frame.pixels, Tensor)
    sure([result.boxes.data], [expected.boxes.data])
    np.testing.assert_array_equal(result.image, images[0])  # which fetches it
    assert result.plot().shape == images[0].shape


def test_a_video_comes_frame_by_frame_from_the_graph(images: list[Image]) -> None:
    network = graph_network(required=True)
    detector = Detector(device="cpu", imgsz=SIZE)
    detector.network, detector._frames = network, CapturedFrames(network, Suppression(), 1)
    read: list[int] = []

    class Counting(Source):
        def __iter__(self) -> Any:
            for frame in super().__iter__():
                read.append(frame.item)
                yield frame

    results = detector.stream(Counting([images[0][:64, :64]] * 50))
    for taken in (1, 2, 3):
        next(results)
        assert len(read) <= taken + 1  # one more is under way
    results.close()


def test_detecting_loads_no_compiler() -> None:
    code = """
import sys
from yolov7 import Detector
import numpy as np
Detector(device="cpu", imgsz=64)(np.zeros((64, 64, 3), np.uint8))
print([name for name in ("torch._dynamo", "torch._inductor", "sympy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# what is not to be had


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"conf": -0.1}, "conf is -0.1: give 0 to 1"),
        ({"conf": float("nan")}, "conf is nan: give 0 to 1"),
        ({"iou": 1.5}, "iou is 1.5: give 0 to 1"),
        ({"max_det": 0}, "max_det is 0: give a whole number, 1 or more"),
        ({"max_det": 10.0}, "max_det is 10.0: give a whole number"),
    ],
)
def test_suppression_out_of_range(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Suppression(**wrong)


def test_imgsz_has_one_rule() -> None:
    p5, p6 = create_model("yolov7-tiny", width=0.125), create_model("yolov7-w6", width=0.0625)
    assert fit(300, p5) == (320, 320)
    assert fit((1, 640), p6) == (64, 640)
    assert fit(None, p5) == (640, 640)
    for wrong in (0, -5, 10**6, (640, 0), 300.5):
        with pytest.raises(UserError, match=r"imgsz is .*: give 1 to 4096 pixels"):
            fit(wrong, p5)  # type: ignore[arg-type]  # also what is no size


def test_a_device_that_is_lost_ends_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(_: object) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "current_stream", lost)
    with pytest.raises(UserError, match=r"cuda has failed .*: start again, with --engine eager"):
        require_living_device(torch.device("cuda"), "RuntimeError")


def test_found_says_what_belongs_to_whom() -> None:
    boxes = torch.arange(24.0).view(2, 2, 6)
    found = Found(boxes, torch.tensor([1, 2]), torch.tensor([0, 7]), {})
    assert [(len(rows), beyond) for rows, beyond in found.rows()] == [(1, 0), (2, 7)]
