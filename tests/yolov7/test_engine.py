"""The plan, run through the kernels' references, against the eager model; fp8; whole frames."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.resources import as_file, files

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.yolov7.networks import SMALL, small_model
from yolov7.checkpoint import load_model
from yolov7.detector import Detector
from yolov7.engine.frames import to_input
from yolov7.engine.graph import planned as engine_network
from yolov7.engine.graph.calibrate import Histogram, calibrate
from yolov7.engine.graph.captured import FramePipeline
from yolov7.engine.graph.planned import PlannedNetwork, with_index
from yolov7.images import read_image
from yolov7.kernels.conv import LARGEST, Stem
from yolov7.letterbox import Image, letterbox, letterbox_geometry
from yolov7.model import YOLOv7
from yolov7.suppression import Suppression

CPU = torch.device("cpu")


def planned(
    model: YOLOv7, shape: Sequence[int], dtype: torch.dtype = torch.float32, **options: object
) -> PlannedNetwork:
    network = PlannedNetwork(model, *shape, dtype=dtype, device=CPU, **options)  # type: ignore[arg-type]  # ranges
    network.poison()
    return network


def relative_rms(a: Tensor, b: Tensor) -> float:
    return float(((a - b).double().square().mean() / b.double().square().mean()).sqrt())


@pytest.mark.parametrize("shape", [(1, 128, 128), (3, 64, 192)], ids=str)
@pytest.mark.parametrize("name", SMALL)
@torch.no_grad()
def test_plan_equals_the_eager_model(name: str, shape: tuple[int, int, int]) -> None:
    model = small_model(name)
    network = planned(model, shape)
    for seed in (0, 1):  # the second run finds the first one's leftovers in every buffer
        x = torch.rand(shape[0], 3, *shape[1:], generator=torch.Generator().manual_seed(seed))
        expected = model(x)
        assert relative_rms(network(x), expected) <= 1e-5
        assert network(x).shape == expected.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["yolov7-tiny", "yolov7-w6"])
def test_fp32_is_multiplied_exactly_from_the_first_layer_on(name: str, dtype: torch.dtype) -> None:
    network = planned(small_model(name), (1, 64, 64), dtype)
    layers = [call.layer for launch in network.convolutions for call in launch.calls]
    assert any(isinstance(layer, Stem) for layer in layers)
    assert {layer.exact for layer in layers} == {dtype == torch.float32}


def test_cuda_is_the_device_that_was_current(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the threads that run the network later the current device is another, the first."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert with_index(torch.device("cuda")) == torch.device("cuda", 1)
    for device in (torch.device("cuda", 0), CPU, torch.device("meta")):
        assert with_index(device) == device
    monkeypatch.setattr(engine_network, "with_index", lambda _: CPU)
    network = PlannedNetwork(
        small_model("yolov7-tiny"), 1, 64, 64, dtype=torch.float32, device=torch.device("cuda")
    )
    assert network.device == network.images.device == CPU


def test_every_launch_runs_on_the_networks_device(monkeypatch: pytest.MonkeyPatch) -> None:
    network = planned(small_model("yolov7-tiny"), (1, 64, 64))
    entered: list[None] = []

    @contextmanager
    def on_device() -> Iterator[None]:
        entered.append(None)
        yield

    monkeypatch.setattr(network, "_on_device", on_device)
    for count, (_, run) in enumerate(network.launches(), 1):
        run()
        assert len(entered) == count
    network.run()
    assert len(entered) == count + 1


@torch.no_grad()
def test_what_fails_beside_others_is_compiled_again_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    network = planned(small_model("yolov7-tiny"), (1, 64, 64))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    outcomes = iter(["beside", "", "", "beside", "beside", "alone"])

    def compiles() -> None:
        if failure := next(outcomes):
            raise RuntimeError(failure)

    network._launches = [(step, [compiles]) for step, _ in network._launches[:2]]
    network._compile()
    with pytest.raises(RuntimeError, match="alone"):
        network._compile()


def test_candidates_are_the_dense_rows_above_the_threshold() -> None:
    model = load_model().fuse()
    network = planned(model, (1, 64, 96))
    dense = network(torch.rand(1, 3, 64, 96))
    conf = float(dense[0, :, 4].quantile(0.9))
    rows, counts = network.decode(conf)
    segments = rows.view(1, counts.shape[1], -1, rows.shape[2])
    kept = torch.cat([segments[0, i, :n] for i, n in enumerate(counts[0].tolist())])
    torch.testing.assert_close(kept, dense[0][dense[0, :, 4] > conf])


@torch.no_grad()
def test_bf16_stays_near() -> None:
    model = load_model().fuse()
    x = torch.rand(1, 3, 96, 96)
    expected = model(x)
    error = relative_rms(planned(model, (1, 96, 96), torch.bfloat16)(x), expected)
    assert 1e-6 < error < 0.02


@torch.no_grad()
@pytest.mark.parametrize("dtype", LARGEST, ids=str)
def test_what_is_calibrated_stays_near_and_really_has_eight_bits(dtype: torch.dtype) -> None:
    model = load_model().fuse()
    detector = Detector()
    x = next(iter(sample_batches(detector)))
    ranges = calibrate(model, [x], dtype)
    network = planned(model, (1, *x.shape[2:]), ranges=ranges, narrow=dtype)
    expected = model(x)
    error = relative_rms(network(x)[..., 4:], expected[..., 4:])
    assert 1e-3 < error < 0.1
    narrow = [b for b in network.plan.buffers if b.itemsize == 1]
    assert len(narrow) > len(network.plan.buffers) / 2
    head = {w.buffer.index for w in network.plan.steps[-1].tasks[0].reads}
    assert not head & {b.index for b in narrow}


def sample_batches(detector: Detector) -> list[Tensor]:
    batches = []
    for frame in sample_frames():
        where = letterbox_geometry(frame.shape[:2], detector.imgsz, stride=32, auto=True)
        batches.append(to_input([letterbox(frame, where)], CPU, torch.float32))
    return batches


@torch.no_grad()
def test_a_range_that_is_too_small_saturates() -> None:
    model = load_model().fuse()
    x = sample_batches(Detector())[0]
    ranges = calibrate(model, [x])
    shape = (1, *x.shape[2:])
    good = relative_rms(planned(model, shape, ranges=ranges)(x), model(x))
    tight = {name: limit / 8 for name, limit in ranges.items()}
    assert relative_rms(planned(model, shape, ranges=tight)(x), model(x)) > 2 * good


def test_calibration_needs_one_shape() -> None:
    model = load_model().fuse()
    with pytest.raises(ValueError, match="one shape"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="one shape"):
        calibrate(model, [torch.zeros(1, 3, 32, 32), torch.zeros(1, 3, 32, 64)])


def test_fp8_range_of_a_map_ignores_one_outlier() -> None:
    histogram = Histogram()
    values = torch.randn(200_000)
    histogram.add(values)
    first = histogram.range(torch.float8_e4m3fn)
    histogram.add(torch.tensor([40.0]))  # larger than the first limit: the bins double
    assert histogram.counts.sum() == 200_001
    assert 3 < first < 6
    for dtype in LARGEST:
        assert 0 < histogram.range(dtype) <= 40.5


def sample_frames() -> list[Image]:
    with as_file(files("yolov7.assets") / "images") as folder:
        return [read_image(path) for path in sorted(folder.glob("*.jpg"))]


def submitted(pipeline: FramePipeline, frames: list[Image]) -> list[Tensor]:
    boxes = [letterbox_geometry(f.shape[:2], 320, stride=32, auto=True) for f in frames]
    found = pipeline.submit(frames, boxes).wait()
    return [rows[:n] for rows, n in zip(found.boxes, found.counts.tolist(), strict=True)]


def test_frames_of_several_sizes_give_the_detectors_boxes() -> None:
    model = load_model()
    frames = sample_frames()[:3]
    frames[1] = np.asarray(cv2.resize(frames[1], (500, 375)), np.uint8)
    expected = Detector(model)(frames)
    network = PlannedNetwork(model.fuse(), 3, 256, 320, dtype=torch.float32, device=CPU)
    pipeline = FramePipeline(network, Suppression(), capacity=sum(f.size for f in frames))
    for rows, result in zip(submitted(pipeline, frames), expected, strict=True):
        torch.testing.assert_close(rows, result.boxes.data, rtol=1e-4, atol=1e-2)
    # Fewer frames than the batch, after a full one.
    (rows,) = submitted(pipeline, frames[2:])
    torch.testing.assert_close(rows, expected[2].boxes.data, rtol=1e-4, atol=1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_in_flight_keep_their_own_geometry() -> None:
    """Three batches go up before the first is waited for; frames of one letterbox, many sizes."""
    model, device = load_model().fuse(), torch.device("cuda")
    sizes = [(240, 320), (480, 640), (720, 960), (960, 1280), (120, 160), (600, 800)]
    first = sample_frames()[0]
    frames = [np.asarray(cv2.resize(first, (w, h)), np.uint8) for h, w in sizes]
    boxes = [letterbox_geometry(f.shape[:2], 320, stride=32, auto=True) for f in frames]
    network = PlannedNetwork(model, 1, *boxes[0].shape, dtype=torch.float32, device=device)
    pipeline = FramePipeline(network, Suppression(), capacity=max(f.size for f in frames))
    tensors = [torch.from_numpy(frame) for frame in frames]
    alone = [pipeline.submit([t], [b]).wait().boxes for t, b in zip(tensors, boxes, strict=True)]
    for source in (tensors, [tensor.to(device) for tensor in tensors]):
        for _ in range(20):
            flight = [pipeline.submit([t], [b]) for t, b in zip(source, boxes, strict=True)]
            for pending, expected in zip(flight, alone, strict=True):
                assert torch.equal(pending.wait().boxes, expected)


def test_overflow_is_counted() -> None:
    model = load_model().fuse()
    network = PlannedNetwork(model, 1, 256, 320, dtype=torch.float32, device=CPU)
    frame = sample_frames()[0]
    few = FramePipeline(network, Suppression(conf=0.1, max_candidates=5), capacity=frame.size)
    box = letterbox_geometry(frame.shape[:2], 320, stride=32, auto=True)
    found = few.submit([torch.from_numpy(frame)], [box]).wait()
    assert int(found.counts[0]) <= 5
    assert int(found.overflow[0]) > 0


def test_pipeline_refuses_what_does_not_fit() -> None:
    model = load_model().fuse()
    network = PlannedNetwork(model, 1, 64, 64, dtype=torch.float32, device=CPU)
    pipeline = FramePipeline(network, Suppression(), capacity=1000)
    frame = torch.zeros(64, 64, 3, dtype=torch.uint8)
    box = letterbox_geometry((64, 64), 64)
    with pytest.raises(ValueError, match="more than 1000 bytes"):
        pipeline.submit([frame], [box])
    with pytest.raises(ValueError, match="2 frames and 2 boxes for a batch of 1"):
        pipeline.submit([frame, frame], [box, box])
