"""Where exported files run, without exporting any."""

import json
import zipfile
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from yolov7.engine.exported import FORMAT, PT2_ENTRY, ExportedNetwork, Metadata, _pt2_device
from yolov7.errors import UserError

GRAPH = """
<ir_version: 8, opset_import: ["" : 18]>
graph (float[1, 3, 32, 32] images) => (float[1, 3, 32, 32] predictions)
{ predictions = Identity(images) }
"""
CUDA, CPU = "CUDAExecutionProvider", "CPUExecutionProvider"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An ONNX file of someone else's."""
    path = tmp_path / "other.onnx"
    onnx.save(onnx.parser.parse_model(GRAPH), path)
    return path


def metadata(device: str) -> Metadata:
    return Metadata(
        format=FORMAT,
        kind="torch-export",
        variant="yolov7-tiny",
        names=["cell"],
        stride=32,
        imgsz=(32, 32),
        batch=1,
        precision="fp32",
        layout="grid",
        letterbox=False,
        nms=None,
        device=device,
        version="",
    )


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """All of a .pt2 for a CPU that is read before its device is known."""
    path = tmp_path / "program.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"program/extra/{PT2_ENTRY}", json.dumps(metadata("cpu").to_text()))
    return path


def network(path: Path, **options: Any) -> ExportedNetwork:
    described: dict[str, Any] = (
        {} if path.suffix == ".pt2" else {"names": ["cell"], "layout": "grid"}
    )
    return ExportedNetwork(path, **described, **options)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("gpu", "device gpu: give auto, cpu, cuda, cuda:N, N or mps"),
        ("cuda:9", "device cuda:9: 2 CUDA devices are here"),
    ],
)
def test_devices_are_checked(
    device: str, message: str, file: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for path in (file, program):
        with pytest.raises(UserError, match=message):
            network(path, device=device)
    with pytest.raises(UserError, match=message):
        network(file, engine="openvino", device=device)


def test_devices_that_a_file_does_not_run_on(
    file: Path, program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="device cuda: OpenVINO runs on a CPU"):
        network(file, engine="openvino", device="cuda")
    with pytest.raises(UserError, match="device cuda:1: ONNX Runtime has none"):
        network(file, device="cuda:1")
    with pytest.raises(UserError, match=r"program\.pt2: was exported for cpu"):
        network(program, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", "cuda", "cuda:0"):
        assert _pt2_device(program, metadata("cuda"), device) == torch.device("cuda")
    with pytest.raises(UserError, match=r"program\.pt2: runs on the first GPU"):
        _pt2_device(program, metadata("cuda"), "cuda:1")


@pytest.mark.parametrize("seen", [4, 0], ids=["torch for CUDA", "torch for a CPU"])
@pytest.mark.parametrize(
    ("device", "providers"),
    [
        ("cuda:3", [(CUDA, {"device_id": 3}), CPU]),
        ("cuda", [(CUDA, {"device_id": 0}), CPU]),
        ("auto", [(CUDA, {"device_id": 0}), CPU]),
        ("cpu", [CPU]),
    ],
    ids=["cuda:3", "cuda", "auto", "cpu"],
)
def test_onnx_runtime_is_told_the_gpu(
    device: str, providers: list[Any], seen: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It brings its own CUDA: PyTorch need not see the GPU."""
    session = onnxruntime.InferenceSession
    told: list[Any] = []

    def spy(source: Any, options: Any, providers: list[Any]) -> Any:
        told.extend(providers)
        return session(source, options, providers=providers[-1:])

    monkeypatch.setattr(onnxruntime, "InferenceSession", spy)
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: seen > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: seen)
    engine = network(file, device=device).engine
    assert engine == ("onnxruntime" if device == "cpu" else "onnxruntime-cuda")
    assert told == providers
