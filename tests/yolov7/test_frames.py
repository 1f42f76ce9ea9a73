"""The one way from frames to boxes: both forms of it, of which validation is made, too."""

import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.yolov7.data_sets import sample
from tests.yolov7.networks import SIZE, StandIn, graph_network, sure
from tests.yolov7.pictures import SAMPLES
from yolov7 import Detector, create_model, items
from yolov7.checkpoint import load_model
from yolov7.dataset import Dataset, load_data
from yolov7.engine.choose import Runtime, fit, open_frames, open_network
from yolov7.engine.faults import require_living_device
from yolov7.engine.frames import Found, to_input
from yolov7.engine.graph import network as graph_module
from yolov7.engine.graph.network import CapturedFrames
from yolov7.errors import UserError
from yolov7.evaluate import Settings, evaluate, predict
from yolov7.evaluate.run import EVERYTHING
from yolov7.export import Settings as ExportSettings
from yolov7.export import export
from yolov7.letterbox import Image, letterbox, letterbox_geometry
from yolov7.results import Results
from yolov7.sources import Source
from yolov7.suppression import Suppression


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
