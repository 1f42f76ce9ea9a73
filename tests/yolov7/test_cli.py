"""The command line itself, `info` and `convert`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import yolov7
from yolov7.checkpoint import DEMO_WEIGHTS, load_model
from yolov7.cli import VERBS, main
from yolov7.cli.convert import _batches
from yolov7.errors import UserError

ASSETS = Path(yolov7.__file__).parent / "assets"


def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"  {verb}" in printed for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([verb, "--help"])
    assert end.value.code == 0
    assert f"usage: yolov7 {verb}" in capsys.readouterr().out


def test_wrong_usage_exits_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert main(["predcit"]) == 2
    assert "did you mean predict?" in capsys.readouterr().err
    with pytest.raises(SystemExit) as end:
        main(["info", "yolov7", "--imgzs", "640"])
    assert end.value.code == 2
    assert "--imgsz" in capsys.readouterr().err  # the nearest option


@pytest.mark.parametrize("verb", VERBS)
def test_help_says_a_default_once(
    verb: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        main([verb, "--help"])
    printed = capsys.readouterr().out
    for nonsense in ("%%", "{None}", "(default: )", "(default: '')", "None", "default: False"):
        assert nonsense not in printed
    assert all(line.count("default") <= 1 for line in printed.splitlines())


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("detect --source a.jpg", "no verb 'detect': here it is yolov7 predict"),
        ("test", "no verb 'test': here it is yolov7 val"),
        ("task=detect", "no verb 'task=detect': the verb comes first, then --name value"),
        ("--weights a.pt", "no verb '--weights': the verb comes first, then --name value"),
        ("predict --conf-thres 0.4", "--conf-thres: here it is --conf"),
        ("predict --iou_thres=0.4", "--iou_thres=0.4: here it is --iou"),
        ("predict --img-size 640", "--img-size: here it is --imgsz"),
        ("predict --view-img", "--view-img: here it is --show"),
        ("predict source=a.jpg", "source=a.jpg: write --source a.jpg"),
        ("predict model=yolov7.pt", "model=yolov7.pt: here it is --weights yolov7.pt"),
        ("val --batch-size 8", "--batch-size: here it is --batch"),
        ("train --hyp a.yaml", "--hyp: here it is --preset, and --set NAME VALUE"),
        ("export --format tensorrt", "tensorrt: TensorRT builds its engine from --format onnx"),
        ("export --format=engine", "--format=engine: TensorRT builds its engine from --format"),
    ],
)
def test_words_of_other_programs_are_told_the_word_here(
    words: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code: object = main(words.split())
    except SystemExit as end:
        code = end.code
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {line}")
    assert error.count("\n") == 1


def test_a_value_may_hold_an_equals_sign(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["predict", "--weights", "blood-cells", "--source", "http://[::1/a.jpg?source=b"]
    assert main(words) == 1
    assert "Invalid IPv6" in capsys.readouterr().err
    assert main(["predict", "--weights", "blood-cells", "--source", "batch=16.jpg"]) == 1
    assert "batch=16.jpg: no such file" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="a pseudo-terminal is Unix's")
@pytest.mark.parametrize("no_color", ["", "1"])
def test_no_color(no_color: str) -> None:
    import pty

    ours, theirs = pty.openpty()
    environment = {**os.environ, "NO_COLOR": no_color, "TERM": "xterm"}
    command = [sys.executable, "-m", "yolov7", "check", "--help"]
    process = subprocess.Popen(command, stdout=theirs, env=environment)
    os.close(theirs)
    printed = b""
    with suppress(OSError), open(ours, "rb", buffering=0) as file:  # Linux's end of a terminal
        while chunk := file.read(4096):
            printed += chunk
    assert process.wait(60) == 0
    assert b"--split" in printed
    assert (b"\x1b[" in printed) == (not no_color)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are Unix's")
@pytest.mark.parametrize("after", [0.15, 0.6, 1.5, 3.0])
def test_ctrl_c_ends_quietly_at_any_moment(after: float, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "yolov7", "predict", "--device", "cpu", "--nosave"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path
    )
    time.sleep(after)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode in (0, 130, -signal.SIGINT)
    assert "Traceback" not in error
    assert error in ("", "interrupted\n")


def test_user_errors_are_one_line_and_exit_with_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "nothing.pt"]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("error: nothing.pt: no such weights file")
    assert captured.err.count("\n") == 1


def test_info_writes_rows_and_totals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "info.json"
    assert main(["info", "yolov7", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert result["totals"]["layers"] == len(result["rows"]) == 92
    assert result["totals"]["parameters"] == 36_905_341
    assert "36,905,341 parameters" in capsys.readouterr().out
    assert sum(row["flops"] for row in result["rows"]) == result["totals"]["flops"]


def test_info_shows_the_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plan.json"
    assert main(["info", "yolov7", "--plan", "--batch", "1", "--json", str(path)]) == 0
    result = json.loads(path.read_text())
    assert {"launches", "launches_all", "bytes", "unfused_bytes", "flops", "peak_bytes"} <= set(
        result["totals"]
    )
    assert sum(row["bytes"] for row in result["rows"]) == result["totals"]["bytes"]
    assert len(result["rows"]) == result["totals"]["launches"]
    modelled = [row["modelled_seconds"] for row in result["rows"]]
    assert all(low <= high for low, high in modelled)
    least, most = result["totals"]["modelled_seconds"]
    assert sum(low for low, _ in modelled) <= least <= most <= sum(high for _, high in modelled)
    assert (least, most) == pytest.approx((0.51e-3, 0.75e-3), rel=0.01)  # as docs/kernels.md says
    out = " ".join(capsys.readouterr().out.split())
    assert "73 launches" in out
    assert "510 to 744 us by the cost model, which no GPU has calibrated" in out
    assert main(["info", "yolov7", "--plan", "--form", "deploy"]) == 1


@pytest.mark.parametrize(
    "verb",
    [
        ["info", "yolov7-tiny"],
        ["convert", "--weights", str(ASSETS / DEMO_WEIGHTS), "--output", "x.safetensors"],
        ["predict", "--nosave"],
        ["export", "--output", "x.onnx"],
        ["bench", "--engine", "eager"],
        ["val", "--data", "coco"],
    ],
    ids=lambda verb: verb[0],
)
def test_imgsz_means_one_thing_in_every_verb(
    verb: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Rounded up to the stride; 0 is no size, and not the model's own."""
    monkeypatch.chdir(tmp_path)
    for size in ("0", "5000"):
        assert main([*verb, "--imgsz", size]) == 1
        assert capsys.readouterr().err == f"error: imgsz is {size}: give 1 to 4096 pixels\n"


def test_a_warning_is_one_line() -> None:
    code = """
import warnings
from yolov7.cli import info, main
info.run = lambda _: warnings.warn("engine graph is left\\nfor eager") or 0
main(["info", "yolov7"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == "warning: engine graph is left for eager\n"


def test_info_and_convert_round_the_size_up(tmp_path: Path) -> None:
    path = tmp_path / "info.json"
    assert main(["info", "yolov7-w6", "--imgsz", "96", "--json", str(path)]) == 0
    assert json.loads(path.read_text())["totals"]["imgsz"] == 128
    output = tmp_path / "x.safetensors"
    words = ["--weights", str(ASSETS / DEMO_WEIGHTS), "--output", str(output)]
    assert main(["convert", *words, "--imgsz", "100"]) == 0
    assert load_model(output).imgsz == 128


def test_convert_fuses_and_halves(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    embedded = str(ASSETS / DEMO_WEIGHTS)
    assert main(["convert", "--weights", embedded, "--output", str(source), "--imgsz", "640"]) == 0
    assert load_model(source).imgsz == 640
    assert main(["convert", "--weights", str(source), "--output", str(target), "--fuse"]) == 0
    assert load_model(target).form == "fused"
    assert "fused form, 3 classes" in capsys.readouterr().out
    assert main(["convert", "--weights", embedded, "--output", str(tmp_path / "a.pt")]) == 1
    assert "must end in .safetensors" in capsys.readouterr().err


def test_convert_calibrates_for_eight_bits(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One after the other: the second file holds both."""
    weights = str(ASSETS / DEMO_WEIGHTS)
    for precision in ("fp8", "int8"):
        target = tmp_path / f"{precision}.safetensors"
        arguments = ["--weights", weights, "--output", str(target), "--precision", precision]
        assert main(["convert", *arguments]) == 1
        said = "--precision int8 or fp8 and --calibrate FOLDER go together"
        assert said in capsys.readouterr().err
        calibration = ["--calibrate", str(ASSETS / "images"), "--images", "1"]
        assert main(["convert", *arguments, *calibration]) == 0
        out, err = capsys.readouterr()
        assert f"maps calibrated for {precision}" in out
        assert "ranges of 1 images say little of others: give 8 or more" in err
        weights = str(target)
    ranges = load_model(weights).ranges
    assert sorted(ranges) == ["fp8", "int8"]
    for found in ranges.values():
        assert found["stem.1"] > 0
        assert len(found) >= 57  # one for each convolution, the first one perhaps not
    assert ranges["fp8"] != ranges["int8"]


def test_convert_never_replaces_its_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tmp_path / "best.safetensors"
    shutil.copy(ASSETS / DEMO_WEIGHTS, source)
    before = source.read_bytes()
    for output in ([], ["--output", "../" + tmp_path.name + "/best.safetensors"]):
        assert main(["convert", "--weights", "best.safetensors", "--fuse", *output]) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: best.safetensors: would be replaced: ")
        assert "--output" in error
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--precision", "fp8", "--calibrate", "in", "--images", "0"), "images is 0: give a whole"),
        (
            ("--precision", "fp8", "--calibrate", "in", "--images", "-1"),
            "images is -1: give a whole",
        ),
        (("--precision", "fp8", "--calibrate", "in"), "in: a folder without images"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_convert_refuses_what_makes_no_sense(
    options: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").mkdir()
    weights = str(ASSETS / DEMO_WEIGHTS)
    assert main(["convert", "--weights", weights, "--output", "a.safetensors", *options]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not Path("a.safetensors").exists()


def test_calibration_reads_only_what_it_uses(tmp_path: Path) -> None:
    sample = min((ASSETS / "images").glob("*.jpg"))
    for index in range(7):
        if index in (0, 2, 4):  # evenly from the whole folder
            shutil.copy(sample, tmp_path / f"{index}.jpg")
        else:
            (tmp_path / f"{index}.jpg").write_bytes(b"no image")
    model = load_model().fuse()
    batches = _batches(tmp_path, 3, 64, model)
    assert [tuple(x.shape) for x in batches] == [(1, 3, 64, 64)] * 3
    for index in (1, 3, 5, 6):
        (tmp_path / f"{index}.jpg").unlink()
    (tmp_path / "clip.mp4").touch()  # of which all frames would be alike
    assert len(_batches(tmp_path, 32, 64, model)) == 3
    for index in (0, 2, 4):
        (tmp_path / f"{index}.jpg").unlink()
    with pytest.raises(UserError, match="has videos only: give a folder with images"):
        _batches(tmp_path, 32, 64, model)


def test_an_image_without_results_is_no_part_of_a_calibration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in range(9):
        cv2.imwrite(str(tmp_path / f"{index}.png"), np.full((64, 64, 3), 28 * index, np.uint8))
    model = load_model().fuse()

    def bright(module: nn.Module, arguments: tuple[Tensor]) -> Tensor | None:
        (x,) = arguments
        return x * float("nan") if x.mean() > 0.85 else None

    model.register_forward_pre_hook(bright)
    assert len(_batches(tmp_path, 32, 64, model)) == 8
    assert capsys.readouterr().err == (
        f"left out: {tmp_path / '8.png'}: the network's results are no numbers\n"
    )
    model.register_forward_pre_hook(lambda *_: torch.full((1, 3, 64, 64), float("nan")))
    with pytest.raises(UserError, match="no image is left"):
        _batches(tmp_path, 32, 64, model)


def test_import_is_cheap() -> None:
    heavy = "cv2", "matplotlib", "triton", "pycocotools", "rich", "tyro"
    code = f"import sys, yolov7; print([m for m in {heavy!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_attribute_of_the_package() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = yolov7.nothing


@pytest.mark.parametrize(
    ("stated", "expected"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_threads_that_wait_sleep_before_pytorch_is_loaded(
    stated: dict[str, str], expected: str
) -> None:
    code = """
import os, sys
from yolov7.cli import main
main(["--version"])
print(os.environ.get("GOMP_SPINCOUNT"), "torch" in sys.modules)
"""
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=kept | stated
    )
    assert done.stdout.split()[1:] == [expected, "False"]
