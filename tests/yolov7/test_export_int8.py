"""Exporting in int8: what is in the file, what runs it, and what is refused."""

import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from tests.yolov7.test_export import NMS, SAMPLES, batch_of, lively
from yolov7 import YOLOv7, load_model
from yolov7.cli import main
from yolov7.engine.exported import ExportedNetwork
from yolov7.engine.graph.calibrate import calibrate
from yolov7.engine.int8 import Scale
from yolov7.errors import UserError
from yolov7.export import Settings, export
from yolov7.export.quantised import Quantised, rounded
from yolov7.images import read_image

SIZE = (128, 128)
FOLDER = SAMPLES[0].parent


def calibrated(model: YOLOv7) -> YOLOv7:
    batches = [batch_of([path], SIZE) for path in SAMPLES[:3]]
    model.ranges["int8"] = calibrate(copy.deepcopy(model).fuse(), batches, torch.int8)
    return model


def demo() -> YOLOv7:
    return calibrated(load_model("blood-cells").float())


@pytest.mark.parametrize("name", ["yolov7-tiny", "yolov7", "yolov7-w6", "yolov7-e6e"])
def test_a_runtime_convolves_bytes_as_pytorch_rounds_them(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LeakyReLU, SiLU, the first layer of P6, sums: all but the stem's input and the head."""
    model = calibrated(lively(name, 3))
    monkeypatch.setattr("yolov7.export.check.TOLERANCE", {"int8": 1.0})  # of weights by chance
    monkeypatch.setattr("yolov7.export.check.AGREEMENT", 0.0)
    exported = export(model, tmp_path / "m.onnx", Settings(imgsz=SIZE, precision="int8"))

    graph = onnx.load(exported.path).graph
    weights = [
        numpy_helper.to_array(constant) for constant in graph.initializer if len(constant.dims) == 4
    ]
    assert sum(array.dtype == np.int8 for array in weights) >= 0.8 * len(
        [node for node in graph.node if node.op_type == "Conv"]
    )
    x = batch_of(SAMPLES[:1], SIZE)
    fused = copy.deepcopy(model).fuse()
    with torch.no_grad():
        rounded_here, exact = Quantised(copy.deepcopy(fused))(x), fused(x)
    found = ExportedNetwork(exported.path)(x)
    # A sum between two steps goes either way, and takes others with it: as far off, elsewhere.
    lost = (rounded_here - exact).square().mean()
    assert (found - exact).square().mean() < 2 * lost
    assert lost < 0.01 * exact.square().mean()

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(exported.path, options, providers=["CPUExecutionProvider"])
    kinds = [node.op_type for node in onnx.load(tmp_path / "optimised.onnx").graph.node]
    assert kinds.count("QLinearConv") >= 0.8 * sum("Conv" in kind for kind in kinds)


def test_the_demo_keeps_its_detections_and_a_third_of_its_size(tmp_path: Path) -> None:
    model = demo()
    plain = export(copy.deepcopy(model), tmp_path / "fp32.onnx", Settings(imgsz=320))
    settings = Settings(imgsz=320, precision="int8", images=FOLDER)
    exported = export(model, tmp_path / "m.onnx", settings)
    assert exported.size < 0.36 * plain.size
    assert exported.check.images == len(SAMPLES)
    assert exported.check.ap is not None
    assert exported.check.ap > 0.9
    assert "AP 0.9" in str(exported)
    assert "equal to PyTorch" not in str(exported)


def test_frames_go_in_and_boxes_come_out(tmp_path: Path) -> None:
    settings = Settings(imgsz=320, precision="int8", nms=NMS, letterbox=True)
    exported = export(demo(), tmp_path / "m.onnx", settings)
    assert exported.check.detections is not None
    session = onnxruntime.InferenceSession(exported.path)
    boxes, counts = session.run(None, {"image": read_image(SAMPLES[0])})
    assert counts[0] > 3
    assert (boxes[0, : counts[0], 4] > NMS.conf).all()


def test_any_number_of_images_by_operators_of_2021(tmp_path: Path) -> None:
    settings = Settings(imgsz=(64, 96), batch="dynamic", precision="int8", opset=14)
    model = demo()
    exported = export(model, tmp_path / "m.onnx", settings)
    x = batch_of(SAMPLES[:3], (64, 96))
    found, exact = ExportedNetwork(exported.path)(x), model.fuse()(x)
    assert found.shape == exact.shape
    assert (found - exact).square().mean() < 0.01 * exact.square().mean()


def test_openvino_runs_it(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    settings = Settings(kind="openvino", imgsz=320, precision="int8", layout="classes-first")
    exported = export(demo(), tmp_path / "m.xml", settings)
    assert exported.check.ap is not None
    assert exported.check.ap > 0.9


def test_ranges_that_do_not_fit_are_not_kept(tmp_path: Path) -> None:
    model = demo()
    model.ranges["int8"] = {name: limit / 50 for name, limit in model.ranges["int8"].items()}
    with pytest.raises(UserError, match=r"m\.onnx: not kept: its "):
        export(model, tmp_path / "m.onnx", Settings(imgsz=320, precision="int8"))
    assert not list(tmp_path.iterdir())


def test_detections_that_are_lost_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = demo()
    model.ranges["int8"] = {name: limit / 6 for name, limit in model.ranges["int8"].items()}
    monkeypatch.setattr("yolov7.export.check.TOLERANCE", {"int8": 100.0})
    with pytest.raises(UserError, match=r"an AP of 0\.\d+ against those of fp32"):
        export(model, tmp_path / "m.onnx", Settings(imgsz=320, precision="int8"))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--weights", "blood-cells"], "these weights have no ranges for it: yolov7 convert"),
        (["--weights", "blood-cells", "--format", "aoti"], "aoti has no int8: export onnx or"),
    ],
)
def test_what_cannot_be_is_one_line(
    options: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    suffix = ".pt2" if "aoti" in options else ".onnx"
    options += ["--precision", "int8", "--output", str(tmp_path / f"m{suffix}")]
    assert main(["export", *options]) == 1
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_without_images_is_one_line(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="empty"):
        export(demo(), tmp_path / "m.onnx", Settings(images=empty))


def test_ranges_of_another_network_are_refused(tmp_path: Path) -> None:
    model = demo()
    model.ranges["int8"] = {"other": 1.0}
    with pytest.raises(UserError, match="ranges are those of another network"):
        export(model, tmp_path / "m.onnx", Settings(imgsz=320, precision="int8"))


def test_rounding_is_that_of_bytes() -> None:
    x = torch.tensor([-9.0, -0.26, 0.25, 0.24, 0.75, 300.0])
    steps = rounded(x, Scale(0.5, 4)) / 0.5
    assert steps.tolist() == [-4, -1, 0, 0, 2, 251]
    assert rounded(x, None) is x
