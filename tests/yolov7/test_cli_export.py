"""`yolov7 export`, and the other verbs with what it wrote."""

import json
import shlex
from pathlib import Path

import pytest

import yolov7
from yolov7.checkpoint import load_model, save_model
from yolov7.cli import main
from yolov7.images import read_image
from yolov7.results import write_image

ASSETS = Path(yolov7.__file__).parent / "assets"
SAMPLE = str(ASSETS / "images" / "BloodImage_00031.jpg")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cli export") / "blood.onnx"
    assert main(["export", "--batch", "dynamic", "--output", str(path)]) == 0
    return path


def test_says_what_there_is_and_how_to_run_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    weights = tmp_path / "my weights.safetensors"
    save_model(load_model(), weights)
    words = ["--imgsz", "100", "130", "--nms", "onnx", "--with-letterbox", "--conf", "0.3"]
    assert main(["export", "--weights", str(weights), *words]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    size = (tmp_path / "my weights.onnx").stat().st_size / 2**20
    first, *lines, last = captured.out.splitlines()
    told = f"my weights.onnx: yolov7-tiny, onnx, fp32, 128 x 160, {size:.1f} MiB, opset 18, "
    assert first.startswith(told)
    assert [line.split(":")[0].strip() for line in lines[:3]] == [
        "input   image",
        "output  detections",
        "output  counts",
    ]
    assert "uint8 [height, width, 3], BGR, 0 to 255" in lines[0]
    assert "float32 [1, 300, 6], x1, y1, x2, y2 in pixels of the image, score 0 to 1" in lines[1]
    assert "RBC, WBC, Platelets" in lines[3]
    assert "confidence over 0.3, IoU up to 0.45, at most 300" in lines[4]
    assert "relative RMS" in lines[5]
    command = shlex.split(last.removeprefix("run it: "))
    assert command[0] == "yolov7"
    assert main([*command[1:], "--source", SAMPLE, "--nosave"]) == 0
    assert "128x160 " in capsys.readouterr().out


def test_predict_finds_what_the_weights_find(file: Path, tmp_path: Path) -> None:
    # of a square image the canvas is the same with a fixed size and without
    square = write_image(tmp_path / "square.png", read_image(SAMPLE)[:, :480])
    results = []
    for weights in ("blood-cells", str(file)):
        target = tmp_path / "result.json"
        words = ["--nosave", "--project", str(tmp_path / "runs"), "--json", str(target)]
        assert (
            main(["predict", "--weights", weights, "--source", str(square), "--batch", "2", *words])
            == 0
        )
        results.append(json.loads(target.read_text())[0]["boxes"])
    eager, exported = results
    assert len(exported) == len(eager) > 5
    for ours, theirs in zip(eager, exported, strict=True):
        assert ours["name"] == theirs["name"]
        assert ours["confidence"] == pytest.approx(theirs["confidence"], abs=1e-3)
        assert ours["xyxy"] == pytest.approx(theirs["xyxy"], abs=0.1)


def test_val_gives_the_same_ap(
    file: Path, data_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = []
    for weights in ("blood-cells", str(file)):
        target = tmp_path / "result.json"
        data = ["--data", str(data_dir / "blood-cells" / "data.yaml"), "--split", "test"]
        words = ["--preparation", "square", "--project", str(tmp_path), "--json", str(target)]
        assert main(["val", *weights, *data, *words]) == 0
        found.append(json.loads(target.read_text())["AP"])
    assert found[0] == pytest.approx(found[1], abs=1e-3)
    assert found[0] > 0.47
    assert "yolov7-tiny, exported as onnx; cpu, fp32, onnxruntime" in capsys.readouterr().out


def test_errors_are_one_line(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = tmp_path / "cut.onnx"
    cut.write_bytes(file.read_bytes()[:10_000])
    target = str(tmp_path / "m.onnx")
    for words, message in (
        (["export", "--nms", "onnx", "--layout", "classes-first"], "leave the layout out"),
        (["export", "--output", str(tmp_path / "m.engine")], "must end in .onnx"),
        (["export", "--weights", "nothing.pt"], "no such weights file"),
        (["export", "--format", "aoti", "--nms", "onnx", "--output", target], "export onnx"),
        (["predict", "--weights", str(cut)], "truncated, or not an ONNX file"),
        (["predict", "--weights", str(file), "--imgsz", "640"], "320 x 320 pixels only"),
        (["predict", "--weights", str(file), "--names", "a", "b"], "leave --names and --layout"),
        (["predict", "--names", str(file.with_suffix(".yaml"))], "cannot be read: No such file"),
    ):
        assert main(words) == 1, words
        error = capsys.readouterr().err
        assert message in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1


def test_unknown_formats_are_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["export", "--format", "tflite"])
    assert end.value.code == 2
    assert "'onnx', 'openvino', 'torch-export', 'aoti'" in " ".join(capsys.readouterr().err.split())


def test_names_come_from_a_data_yaml() -> None:
    from yolov7.cli.options import class_names

    assert class_names(()) is None
    assert class_names(("a", "b")) == ["a", "b"]
    names = class_names((str(ASSETS / "coco.yaml"),))
    assert names is not None
    assert (len(names), names[0]) == (80, "person")
