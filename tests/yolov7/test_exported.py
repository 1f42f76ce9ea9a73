"""Where exported files run, without exporting any."""

import io
import json
import subprocess
import sys
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch

from tests.yolov7.exports import METADATA
from yolov7.engine.exported import ExportedNetwork
from yolov7.errors import UserError
from yolov7.formats import FORMATS, pt2

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


PROGRAM = replace(METADATA, kind="torch-export")  # for a CPU


@pytest.fixture
def program(tmp_path: Path) -> Path:
    """All of a .pt2 for a CPU that is read before its device is known."""
    path = tmp_path / "program.pt2"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"program/extra/{pt2.ENTRY}", json.dumps(PROGRAM.to_text()))
    return path


def network(path: Path, **options: Any) -> ExportedNetwork:
    described: dict[str, Any] = (
        {"trust": True} if path.suffix == ".pt2" else {"names": ["cell"], "layout": "grid"}
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
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    with pytest.raises(UserError, match="device mps: ONNX Runtime runs on cpu or cuda"):
        network(file, device="mps")
    with pytest.raises(UserError, match=r"program\.pt2: was exported for cpu"):
        network(program, device="cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", "cuda", "cuda:0"):
        assert pt2.device_of(program, replace(PROGRAM, device="cuda"), device) == torch.device(
            "cuda"
        )
    with pytest.raises(UserError, match=r"program\.pt2: runs on the first GPU"):
        pt2.device_of(program, replace(PROGRAM, device="cuda"), "cuda:1")


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


def described(path: Path, changes: dict[str, str | None]) -> Path:
    """`path` with our metadata, parts of which are changed."""
    model = onnx.load(path)
    for key, value in {**PROGRAM.to_text(), "kind": '"onnx"', **changes}.items():
        if value is not None:
            model.metadata_props.add(key=key, value=value)
    onnx.save(model, path)
    return path


DEEP = "[" * 100_000
WRONG = [
    ("format", None, "lacks format"),
    ("format", '"yolov7-triton-export/9"', "of format 'yolov7-triton-export/9'; this version"),
    ("format", "[]", "format is a list, not a text"),
    ("variant", '"\\u001b[31m"', "variant is no printable text"),
    ("names", None, "lacks names"),
    ("names", "7", "names is no list"),
    ("names", "[]", "names are none"),
    ("names", "[null]", r"names\[0\] is None, not a text"),
    ("names", DEEP, "nested too deeply"),
    ("names", json.dumps(["x" * (1 << 21)]), "more than 1048576 characters"),
    ("imgsz", "7", "imgsz is no list"),
    ("imgsz", "[32]", "imgsz has 1 values instead of 2"),
    ("imgsz", "[32, 1e400]", r"imgsz\[1\] is inf, not a whole number"),
    ("imgsz", "[1000000, 1000000]", "imgsz is 1000000 x 1000000: give 1 to 4096 pixels"),
    ("imgsz", "[64, 64]", "its input is not of its imgsz"),
    ("batch", "0", "batch is 0: give 1 or more"),
    ("batch", "2000000000", "batch is 2000000000: give at most 64 million pixels"),
    ("batch", "{}", "batch is a table, not dynamic"),
    ("batch", "1" + "0" * 5000, "damaged"),
    ("stride", "-1", "stride is -1"),
    ("stride", "32767", "stride is 32767: give 1 to 64 pixels"),
    ("stride", "true", "stride is True, not a whole number"),
    ("stride", "{", "damaged"),
    ("precision", '"int4"', "precision is 'int4', not fp32, fp16"),
    ("layout", '"detections"', "layout is detections, but nms is None"),
    ("layout", "{}", "layout is a table"),
    ("letterbox", "1", "letterbox is 1, not true or false"),
    ("nms", "[]", "nms is a list, not a table"),
    ("nms", '{"conf": 2, "iou": 0.5, "max_det": 1}', "conf is 2.0: give 0 to 1"),
    ("nms", '{"conf": "x", "iou": 0.5, "max_det": 1}', "nms.conf is 'x', not a number"),
    ("device", '"tpu"', "device is 'tpu', not cpu, cuda"),
    ("device", "null", "device is None"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG, ids=lambda v: str(v)[:20])
def test_metadata_that_means_harm(key: str, value: str | None, message: str, file: Path) -> None:
    path = described(file, {key: value})
    with pytest.raises(UserError, match=message) as error:
        ExportedNetwork(path)
    assert str(error.value).isprintable()


def test_a_graph_that_is_not_what_it_says(file: Path) -> None:
    x = torch.zeros(1, 3, 32, 32)
    for changes, message in {
        ("names",): r"its output \[1, 3, 32, 32\] is not of layout grid with 1 classes",
        ("batch", "3"): "cannot be run",
    }.items():
        path = described(file, dict([changes]) if len(changes) == 2 else {})
        with pytest.raises(UserError, match=message):
            ExportedNetwork(path)(x)


def test_labels_that_are_no_classes(tmp_path: Path) -> None:
    graph = """
<ir_version: 8, opset_import: ["" : 18]>
graph (float[1, 3, 32, 32] images) => (float[1, 3, 6] detections)
<float[1, 3, 6] rows = {0, 0, 1, 1, 0.5, 0, 0, 0, 1, 1, 0.5, $, 0, 0, 0, 0, 0, 0}>
{ detections = Identity(rows) }
"""
    nms = '{"conf": 0.1, "iou": 0.5, "max_det": 3}'
    for label, fits in (("0", True), ("1", False), ("-1", False), ("1e30", False)):
        path = tmp_path / "m.onnx"
        onnx.save(onnx.parser.parse_model(graph.replace("$", label)), path)
        network = ExportedNetwork(described(path, {"layout": '"detections"', "nms": nms}))
        if fits:
            assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 3, 6)
            continue
        with pytest.raises(UserError, match="finds classes that it has not"):
            network(torch.zeros(1, 3, 32, 32))


def test_metadata_of_a_pt2_is_read_within_limits(tmp_path: Path) -> None:
    path = tmp_path / "m.pt2"
    for content, message in {
        b" " * 200_000_000: "truncated, or not a .pt2 file",  # of 200 KB, packed
        DEEP.encode(): "truncated, or not a .pt2 file",
        b"[]": "its metadata is damaged: it is no table of texts",
        b'{"format": 7}': "its metadata is damaged: it is no table of texts",
        b"\xff": "truncated, or not a .pt2 file",
    }.items():
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(f"m/extra/{pt2.ENTRY}", content)
        tracemalloc.start()
        with pytest.raises(UserError, match=message):
            ExportedNetwork(path)
        assert tracemalloc.get_traced_memory()[1] < 20e6
        tracemalloc.stop()


EVIL = """
import sys
from yolov7.engine.exported import ExportedNetwork
ExportedNetwork(sys.argv[1], trust=len(sys.argv) > 2)
"""


def test_nothing_of_a_pt2_is_executed_without_trust(tmp_path: Path) -> None:
    """PyTorch unpickles example inputs, whatever they are."""
    path, proof = tmp_path / "evil.pt2", tmp_path / "executed"

    class Evil:
        def __reduce__(self) -> Any:
            return Path.touch, (proof,)

    torch.export.save(
        torch.export.export(torch.nn.Identity(), (torch.zeros(1),)),
        path,
        extra_files={pt2.ENTRY: json.dumps(PROGRAM.to_text())},
    )
    pickled = io.BytesIO()
    torch.save(Evil(), pickled)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:  # stored, as PyTorch has it
        for name, data in content.items():
            archive.writestr(name, pickled.getvalue() if "/sample_inputs/" in name else data)

    def load(*words: str) -> str:
        command = [sys.executable, "-c", EVIL, str(path), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stderr

    assert "PyTorch executes what a .pt2 file says while it loads it: if you trust" in load()
    assert not proof.exists()
    load("trusted")
    assert proof.exists()  # the danger is real


def test_every_format_has_what_a_format_has(tmp_path: Path) -> None:
    assert list(FORMATS) == ["onnx", "openvino", "torch-export", "aoti"]
    unknown = tmp_path / "m.pt2"
    with zipfile.ZipFile(unknown, "w") as archive:
        text = {**PROGRAM.to_text(), "kind": '"tflite"'}
        archive.writestr(f"m/extra/{pt2.ENTRY}", json.dumps(text))
    with pytest.raises(UserError, match=r"m\.pt2: not written by `yolov7 export`, or by a later"):
        ExportedNetwork(unknown, trust=True)
