import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import yaml

from yolov7 import window
from yolov7.cli import main
from yolov7.cli.options import COCO_WEIGHTS
from yolov7.cli.predict import Predict
from yolov7.download import PUBLISHED
from yolov7.images import read_image


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def predict(*arguments: str) -> int:
    named = "--weights" in arguments or "--source" not in arguments
    weights = [] if named else ["--weights", "blood-cells"]
    return main(["predict", "--device", "cpu", *weights, *arguments])


def sample(name: str = "BloodImage_00068.jpg") -> np.ndarray:
    from importlib.resources import files

    return read_image(str(files("yolov7.assets") / "images" / name))


def write_sample(path: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(path, sample())


def write_video(path: str, frames: int = 4) -> None:
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 10.0, (320, 240))
    for _ in range(frames):
        writer.write(cv2.resize(sample(), (320, 240)))
    writer.release()


def test_without_arguments_it_shows_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert predict() == 0
    first, *lines = capsys.readouterr().out.splitlines()
    assert first.startswith("embedded demo weights blood-cells-tiny.safetensors (RBC, WBC,")
    assert len(lines) == 6
    for number, line in enumerate(lines[:4], 1):
        assert line.startswith(f"image {number}/4 ")
        assert "RBCs, " in line
        assert line.endswith(" ms")
    assert lines[4].startswith("speed per image (p50/p99 ms): pre ")
    assert lines[5] == "annotated pictures in runs/predict/1"
    folder = Path("runs/predict/1")
    assert len(list(folder.glob("*.jpg"))) == 4
    assert yaml.safe_load((folder / "arguments.yaml").read_text())["conf"] == 0.25


def test_everything_that_can_be_saved() -> None:
    write_sample("in/12.png")
    flags = ["--save-txt", "--save-conf", "--save-crop", "--save-json", "--json", "rows.json"]
    assert predict("--source", "in", "--project", "out", "--name", "a", *flags) == 0
    folder = Path("out/a")
    (row,) = json.loads(Path("rows.json").read_text())
    assert set(row) == {"path", "height", "width", "boxes", "speed"}
    assert (row["path"], row["height"], row["width"]) == ("in/12.png", 480, 640)
    count = len(row["boxes"])
    assert count > 5
    picture = read_image(folder / "12.png")
    assert picture.shape == (480, 640, 3)
    assert (picture != sample()).any()
    labels = (folder / "labels" / "12.txt").read_text().splitlines()
    assert len(labels) == count
    assert all(len(line.split()) == 6 for line in labels)
    assert len(list((folder / "crops").glob("*/12-*.jpg"))) == count
    coco = json.loads((folder / "predictions.json").read_text())
    assert len(coco) == count
    assert coco[0]["image_id"] == 12


def test_nothing_is_saved_that_is_not_wanted() -> None:
    write_sample("a.png")
    assert predict("--source", "a.png", "--nosave") == 0
    assert [path.name for path in Path("runs/predict/1").iterdir()] == ["arguments.yaml"]
    assert predict("--source", "a.png", "--nosave") == 0
    assert Path("runs/predict/2").is_dir()


def test_images_of_one_name_do_not_overwrite_each_other() -> None:
    for path in ("a/1.png", "b/1.png", "c/1.tiff"):
        write_sample(path)
    assert predict("--source", "a", "b", "c", "--save-txt") == 0
    folder = Path("runs/predict/1")
    assert {p.name for p in folder.glob("1*")} == {"1.png", "1-2.png", "1-3.tiff"}
    assert {p.name for p in (folder / "labels").iterdir()} == {"1.txt", "1-2.txt", "1-3.txt"}


def test_a_numbered_name_that_an_image_has_already_is_left_to_it() -> None:
    for path in ("d1/a.jpg", "d2/a.jpg", "d3/a-2.jpg", "d4/a.jpg"):
        write_sample(path)
    assert predict("--source", "d1", "d2", "d3", "d4") == 0
    names = {path.name for path in Path("runs/predict/1").glob("*.jpg")}
    assert names == {"a.jpg", "a-2.jpg", "a-2-2.jpg", "a-3.jpg"}


def test_classes_and_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    write_sample("a.png")
    options = ["--classes", "WBC", "2", "--imgsz", "256", "--conf", "0.1"]
    assert predict("--source", "a.png", *options) == 0
    line = capsys.readouterr().out.splitlines()[1]
    assert "192x256 " in line
    assert "RBC" not in line


def test_video_to_video(capsys: pytest.CaptureFixture[str]) -> None:
    write_video("clip one.avi", 5)
    options = ["--vid-stride", "2", "--save-txt", "--json", "rows.json"]
    assert predict("--source", "clip one.avi", *options) == 0
    assert "video 1/1 frame 3/5 clip one.avi: " in capsys.readouterr().out
    folder = Path("runs/predict/1")
    capture = cv2.VideoCapture(str(folder / "clip-one.mp4"))
    frames = 0
    while capture.read()[0]:
        frames += 1
    assert frames == 3
    assert capture.get(cv2.CAP_PROP_FPS) == 5.0
    labels = sorted(path.name for path in (folder / "labels").iterdir())
    assert labels == [f"clip-one-{number:06}.txt" for number in (1, 3, 5)]
    assert [row["frame"] for row in json.loads(Path("rows.json").read_text())] == [1, 3, 5]


def test_the_others_are_done_and_the_exit_code_is_1() -> None:
    """In a process of its own: FFmpeg's log level is set once."""
    write_sample("in/a.png")
    Path("in/cut.png").write_bytes(Path("in/a.png").read_bytes()[:5000])
    Path("in/cut.jpg").write_bytes(cv2.imencode(".jpg", sample())[1].tobytes()[:5000])
    Path("in/no.mp4").write_text("no video")
    sources = ["in", "missing.jpg", "http://[::1/a.jpg", "http://a b/a.jpg", "x" * 300]
    words = ["predict", "--weights", "blood-cells", "--source", *sources]
    command = [sys.executable, "-m", "yolov7", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    out, err = done.stdout, done.stderr
    assert done.returncode == 1
    assert err.splitlines() == [
        "error: in/cut.jpg: truncated, or not an image: replace the file or leave it out",
        "error: in/cut.png: truncated, or not an image: replace the file or leave it out",
        "error: in/no.mp4: not a video that can be read: check the file",
        "error: missing.jpg: no such file: check the path",
        "error: http://[::1/a.jpg: Invalid IPv6 URL: check the address and the connection",
        "error: http://a b/a.jpg: URL can't contain control characters. 'a b' "
        "(found at least ' '): check the address and the connection",
        f"error: {'x' * 300}: cannot be read: File name too long",
        "7 of 8 sources could not be read",
    ]
    assert "image 1/8 in/a.png" in out
    assert Path("runs/predict/1/a.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--source", "absent.jpg"], "absent.jpg: no such file: check the path"),
        (["--source", "."], ".: a folder without images or videos"),
        (["--weights", "absent.pt"], "absent.pt: no such weights file"),
        (["--classes", "RBB"], "no class 'RBB' in this model: did you mean RBC?"),
        (["--tile", "0"], "tile is 0: give 32 pixels or more"),
        (["--vid-stride", "0"], "vid_stride is 0"),
    ],
    ids=lambda value: value[0][2:] if isinstance(value, list) else "",
)
def test_errors_are_one_line(
    arguments: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert predict(*arguments) == 1
    err = capfd.readouterr().err
    assert err.startswith(f"error: {message}")
    assert err.count("\n") == 1


def test_show_without_a_display_is_an_error_before_anything_is_written(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(window, "_opens", lambda: False)
    assert predict("--show") == 1
    assert capfd.readouterr().err == (
        "error: show needs a display, and none can be opened here: leave it out\n"
    )
    assert not Path("runs").exists()


@pytest.mark.parametrize("key", [ord("q"), -1], ids=["q", "closed"])
def test_show_ends_and_the_recording_is_whole(key: int, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video("clip.avi", 5)
    monkeypatch.setattr(window, "_opens", lambda: True)
    monkeypatch.setattr(cv2, "imshow", lambda *_: None)
    monkeypatch.setattr(cv2, "waitKey", lambda _: key)
    monkeypatch.setattr(cv2, "getWindowProperty", lambda *_: 0.0)
    assert predict("--source", "clip.avi", "--show") == 0
    capture = cv2.VideoCapture("runs/predict/1/clip.mp4")
    assert capture.read()[0]
    assert not capture.read()[0]


def test_a_source_without_weights_is_answered_by_what_to_choose(
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_sample("street.png")
    assert main(["predict", "--source", "street.png"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: which weights? add --weights with")
    assert set(COCO_WEIGHTS) <= set(PUBLISHED)
    for part in (*COCO_WEIGHTS, "about  75 MB", "GPL-3.0", "downloaded", "blood-cells", "Apache"):
        assert part in error
    assert not Path("runs").exists()


def test_no_folder_is_left_where_nothing_was_done() -> None:
    assert predict("--source", "absent.jpg") == 1
    assert list(Path("runs/predict").iterdir()) == []
    write_sample("a.png")
    assert predict("--source", "absent.jpg", "a.png") == 1
    assert sorted(path.name for path in Path("runs/predict/1").iterdir()) == [
        "a.png",
        "arguments.yaml",
    ]


def test_json_to_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    write_video("clip.avi", 3)
    assert predict("--source", "clip.avi", "--nosave", "--json", "-") == 0
    printed = capsys.readouterr()
    rows = json.loads(printed.out)
    assert [(row["frame"], row["time"]) for row in rows] == [(1, 0.0), (2, 0.1), (3, 0.2)]
    assert "video 1/1 frame 3/3 clip.avi" in printed.err
    assert not Path("-").exists()


def test_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    write_sample("a.png")
    assert predict("--source", "a.png", "absent.png", "--quiet", "--json", "-") == 1
    printed = capsys.readouterr()
    assert len(json.loads(printed.out)) == 1
    assert printed.err.splitlines() == [
        "error: absent.png: no such file: check the path",
        "1 of 2 sources could not be read",
    ]


def test_a_stream_ends_at_ctrl_c_and_keeps_what_it_has(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Camera:
        def __init__(self, _: object) -> None: ...

        def isOpened(self) -> bool:  # noqa: N802  # OpenCV's name
            return True

        def get(self, _: int) -> float:
            return 0.0

        def read(self) -> tuple[bool, np.ndarray]:
            return True, cv2.resize(sample(), (320, 240))

        def release(self) -> None: ...

    from yolov7.recorder import Recorder

    opened = cv2.VideoCapture
    write = Recorder.write
    seen: list[int] = []

    def interrupted(self: Recorder, result: object) -> None:
        write(self, result)  # type: ignore[arg-type]  # a Results
        seen.append(1)
        if len(seen) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    monkeypatch.setattr(Recorder, "write", interrupted)
    assert predict("--source", "0", "--json", "rows.json") == 0
    out = capfd.readouterr().out
    assert "video 1/1 frame " in out
    assert "frames dropped to keep up with the stream" in out
    assert len(json.loads(Path("rows.json").read_text())) == 3
    assert opened("runs/predict/1/camera-0.mp4").isOpened()


def test_defaults_are_those_of_the_interface() -> None:
    options = Predict()
    assert (options.conf, options.iou, options.max_det, options.imgsz) == (0.25, 0.45, 300, None)


def test_passwords_of_addresses_stand_nowhere(capfd: pytest.CaptureFixture[str]) -> None:
    url = "rtsp://me:s3cret@127.0.0.1:9/cam?token=s3cret"
    write_sample("a.png")
    assert predict("--source", "a.png", url, "--json", "out.json") == 1
    said = capfd.readouterr()
    assert "rtsp://***@127.0.0.1:9/cam" in said.err
    assert "s3cret" not in said.out + said.err
    files = [path for path in Path().rglob("*") if path.is_file()]
    assert Path("runs/predict/1/arguments.yaml") in files
    assert not any(b"s3cret" in path.read_bytes() for path in files)
