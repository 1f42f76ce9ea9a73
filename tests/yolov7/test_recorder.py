"""Files that grow with a prediction: whole or absent, however it ends."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from yolov7.errors import UserError
from yolov7.recorder import Outputs, Recorder
from yolov7.results import Boxes, Results
from yolov7.sources import Frame

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="signals and limits are Unix's")


def result(path: str = "a.png", names: tuple[str, ...] = ("cell",), **frame: object) -> Results:
    image = np.random.default_rng(0).integers(0, 255, (64, 96, 3), np.uint8)
    where = Frame(image, path=path, **{"item": 1, "items": 1, **frame})  # type: ignore[arg-type]
    rows = torch.tensor([[1.0, 2.0, 30.0, 40.0, 0.9, 0.0]])
    return Results(where, Boxes(rows, where.shape), list(names), {"network": 1.0}, (64, 96))


def outputs(folder: Path) -> Outputs:
    return Outputs(folder, coco=True, json=folder / "rows.json")


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


def test_files_appear_when_they_are_whole(tmp_path: Path) -> None:
    with Recorder(outputs(tmp_path)) as recorder:
        for number in range(1, 6):
            recorder.write(result("v.avi", kind="video", number=number))
        assert not {"rows.json", "predictions.json", "v.mp4"} & set(left(tmp_path))
    assert left(tmp_path) == ["predictions.json", "rows.json", "v.mp4"]
    assert cv2.VideoCapture(str(tmp_path / "v.mp4")).get(cv2.CAP_PROP_FRAME_COUNT) == 5


@pytest.mark.parametrize("error", [KeyboardInterrupt, UserError, RuntimeError])
def test_what_was_found_until_then_is_kept(tmp_path: Path, error: type[BaseException]) -> None:
    def end() -> None:
        with Recorder(outputs(tmp_path)) as recorder:
            for number in (1, 2):
                recorder.write(result("v.avi", kind="video", number=number))
            raise error("the end")

    with pytest.raises(error, match="the end"):
        end()
    assert len(json.loads((tmp_path / "rows.json").read_text())) == 2
    assert left(tmp_path) == ["predictions.json", "rows.json", "v.mp4"]


def test_what_cannot_be_written_leaves_what_was_there(tmp_path: Path) -> None:
    import resource  # which Windows has not

    (tmp_path / "rows.json").write_text("old")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def write() -> None:
        with Recorder(Outputs(tmp_path, pictures=False, json=tmp_path / "rows.json")) as recorder:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
            for item in range(100):
                recorder.write(result(item=item))

    try:
        with pytest.raises(UserError, match=r"rows\.json: cannot be written \(File too large"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "rows.json").read_text() == "old"
    assert left(tmp_path) == ["rows.json"]


def test_a_list_that_cannot_be_begun_leaves_no_other(tmp_path: Path) -> None:
    (tmp_path / "predictions.json").mkdir()
    with pytest.raises(UserError, match=r"predictions\.json: cannot be written"):
        Recorder(outputs(tmp_path))
    assert left(tmp_path) == []


def test_numbers_that_are_equal_stay_apart(tmp_path: Path) -> None:
    with Recorder(Outputs(tmp_path, coco=True)) as recorder:
        for item, name in enumerate(("0123.jpg", "123.jpg", "a?b=1.jpg", "http://x/q.jpg?w=1")):
            recorder.write(result(name, item=item))
    rows = json.loads((tmp_path / "predictions.json").read_text())
    assert [row["image_id"] for row in rows] == [123, "123", "a?b=1", "q"]


def test_a_name_that_is_too_long_for_a_file_is_cut(tmp_path: Path) -> None:
    """Of an address, and of a video, whose frames have numbers behind their names."""
    with Recorder(Outputs(tmp_path, txt=True, crop=True)) as recorder:
        for item in (1, 2):
            recorder.write(result(f"https://x/{'a' * 260}?{item}", item=item))
        recorder.write(result(f"{'v' * 251}.avi", item=3, kind="video", number=1))
        recorder.write(result("https://x/c:d.jpg", item=4))
    kept = {path.name for path in tmp_path.glob("*.jpg")}
    assert kept == {f"{'a' * 200}.jpg", f"{'a' * 200}-2.jpg", "c-d.jpg"}
    assert (tmp_path / "labels" / f"{'v' * 200}-000001.txt").is_file()


def test_crops_of_images_with_the_longest_names(tmp_path: Path) -> None:
    with Recorder(Outputs(tmp_path, crop=True)) as recorder:
        for item, last in enumerate("bc"):
            recorder.write(result(f"{'a' * 250}{last}.jpg", item=item))
    crops = {path.name for path in (tmp_path / "crops").glob("*/*.jpg")}
    assert crops == {f"{'a' * 200}-1.jpg", f"{'a' * 200}-2-1.jpg"}
    with Recorder(Outputs(tmp_path / "whole")) as recorder:
        recorder.write(result(f"{'a' * 251}.jpg"))
    assert (tmp_path / "whole" / f"{'a' * 251}.jpg").is_file()


@pytest.mark.parametrize(
    ("name", "folder"),
    [
        ("..", "-"),
        ("", "-"),
        ("a/b\\c", "a-b-c"),
        ("n\0\x1b[31m", "n--[31m"),
        ("x" * 300, "x" * 200),
        ("\U0001f600" * 70, "\U0001f600" * 50),
        ("\ud800", "-"),
        ("wine glass", "wine glass"),
    ],
    ids=["dots", "empty", "separators", "control", "long", "wide", "surrogate", "plain"],
)
def test_any_class_has_a_folder_for_its_crops(tmp_path: Path, name: str, folder: str) -> None:
    (path,) = result(names=(name,)).save_crops(tmp_path / "crops", "a")
    assert path == tmp_path / "crops" / folder / "a-1.jpg"
    assert path.is_file()


def test_names_that_are_not_utf8(tmp_path: Path) -> None:
    """OpenCV ends the process when it is given such a text."""
    with Recorder(Outputs(tmp_path)) as recorder:
        recorder.write(result("caf\udce9.png"))
        with pytest.raises(UserError, match="no UTF-8, which OpenCV needs"):
            recorder._write_frame(result(kind="video"), tmp_path / "caf\udce9" / "v.mp4")
    assert left(tmp_path) == ["caf\udce9.png"]


PREDICT = """
import resource, signal, sys
from yolov7.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
if sys.argv[1] != "0":
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.exit(main(["predict", "--weights", "blood-cells", *sys.argv[2:]]))
"""
JSON = ["--imgsz", "64", "--save-json", "--json", "rows.json"]


def predict(limit: int, *options: str, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", PREDICT, str(limit), *options]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, stdout=pipe, stderr=pipe, text=True)


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 10, (320, 240))
    noise = np.random.default_rng(0).integers(0, 255, (60, 240, 320, 3), np.uint8)
    for picture in noise:
        writer.write(picture)
    writer.release()
    return str(path)


@pytest.mark.parametrize("what", ["video", "json"])
def test_a_full_disk_is_one_line(tmp_path: Path, clip: str, what: str) -> None:
    """A limit on the size of a file stands for it."""
    cut, options = {"video": (100_000, JSON), "json": (4000, [*JSON, "--nosave"])}[what]
    process = predict(cut, "--source", clip, *options, folder=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert err.startswith("error: ")
    assert "cannot be written" in err
    assert err.count("\n") == 1
    # What had room for all of it is there.
    assert set(left(tmp_path)) - {"predictions.json"} == {"arguments.yaml", "clip.avi"}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_signals(tmp_path: Path, clip: str, number: signal.Signals) -> None:
    process = predict(0, "--source", clip, *JSON, folder=tmp_path)
    assert process.stdout is not None
    while "frame 5/" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    made = ["clip.mp4", "predictions.json", "rows.json"]
    if number == signal.SIGKILL:
        assert not set(made) & set(left(tmp_path))
        assert list(tmp_path.glob(".yolov7*.json"))
        again = predict(0, "--json", "rows.json", "--imgsz", "64", folder=tmp_path)
        assert again.wait(60) == 0
        assert not list(tmp_path.glob(".yolov7*"))
        return
    said = {signal.SIGTERM: ("terminated", 143), signal.SIGINT: ("interrupted", 130)}
    assert (err.strip(), process.returncode) == said[number]
    assert left(tmp_path) == ["arguments.yaml", "clip.avi", *made]
    rows = json.loads((tmp_path / "rows.json").read_text())
    frames = cv2.VideoCapture(str(tmp_path / "runs/predict/1/clip.mp4"))
    written = frames.get(cv2.CAP_PROP_FRAME_COUNT)
    assert 4 <= len(rows) <= written <= len(rows) + 1 < 60  # a frame's line comes before its files


def test_nobody_reads_on(tmp_path: Path, clip: str) -> None:
    process = predict(0, "--source", clip, *JSON, folder=tmp_path)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(60) == 141
