import json
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.yolov7.data_sets import BOX, coco_content, coco_data, linux, write_label, yolo_data
from yolov7.cli import main
from yolov7.dataset.check import check_data
from yolov7.text import printable


@pytest.fixture(autouse=True)
def _columns(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "120")


def planted(root: Path) -> Path:
    """A data set with twenty kinds of faults, each in a file of its own."""
    noise = np.random.default_rng(0)

    def image(name: str, *rows: str, split: str = "train") -> Path:
        path = root / f"images/{split}/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = noise.integers(0, 255, (64, 64, 3), dtype=np.uint8)
        path.write_bytes(cv2.imencode(".png", pixels)[1].tobytes())
        if rows:
            write_label(root / f"labels/{split}/{name}.txt", *rows)
        return path

    image("good", *(f"0 0.{x} 0.5 0.1 0.1" for x in range(20, 80)))
    path = image("damaged", BOX)
    data = path.read_bytes()
    path.write_bytes(data[:2000] + bytes(64) + data[2064:])
    path = image("cut", BOX)
    path.write_bytes(data[:2000])
    image("heic", BOX).write_bytes(b"\0\0\0\x18ftypheic" + bytes(20))
    image("class", "7 0.5 0.5 0.1 0.1")
    image("confidence", f"{BOX} 0.9")
    image("flags", f"{BOX} 1 0")
    image("nan", "0 nan 0.5 0.1 0.1")
    image("words", "cell 0.5 0.5 0.1 0.1")
    image("pixels", "0 30 20 10 10")
    image("short", "0 0.5 0.5")
    image("empty", "0 0.5 0.5 0 0.1")
    image("tiny", "0 0.5 0.5 0.01 0.1")
    image("twice", BOX, BOX)
    image("two", BOX, BOX.replace("0 ", "1 ", 1))
    image("unlabelled")
    path = image("binary", BOX)
    (root / "labels/train/binary.txt").write_bytes(b"\xff\xfe\0")
    write_label(root / "labels/train/orphan.txt", BOX)
    shutil.copy(root / "images/train/good.png", root / "images/train/copy.png")
    write_label(root / "labels/train/copy.txt", BOX)
    image("fine", BOX, split="val")
    shutil.copy(root / "images/train/words.png", root / "images/val/other.png")
    write_label(root / "labels/val/other.txt", BOX)
    (root / "images/val/link.png").symlink_to(root / "images/train/nan.png")
    write_label(root / "labels/val/link.txt", BOX)
    text = "names: [a, b, never]\ntrain: images/train\nval: images/val\ntest: images/test\n"
    (root / "data.yaml").write_text(text)
    return root


FOUND = [
    ("damaged image", "damaged.png", "truncated, or not an image"),
    ("unusable image", "cut.png", "truncated, or not an image"),
    ("unusable image", "heic.png", "a HEIC picture"),
    ("wrong label", "class.txt:1", "class 7"),
    ("wrong label", "confidence.txt:1", "leave the confidence out"),
    ("wrong label", "flags.txt:1", "two of them flags"),
    ("wrong label", "nan.txt:1", "cx is nan"),
    ("wrong label", "words.txt:1", "not made of numbers"),
    ("wrong label", "pixels.txt:1", "must be fractions"),
    ("wrong label", "short.txt:1", "3 numbers"),
    ("wrong label", "binary.txt", "cannot be read as text"),
    ("empty box", "empty.txt:1", "no area"),
    ("tiny box", "tiny.png", "0.6 x 6.4 pixels"),
    ("duplicate label", "twice.txt:2", "the same as a line above"),
    ("box of two classes", "two.png", "is a, too"),
    ("image without labels", "unlabelled.png", "there is no"),
    ("label without image", "orphan.txt", "no image of this name"),
    ("duplicate image", "good.png", "the same picture as"),
    ("image of two splits", "other.png", "words.png"),
    ("image of two splits", "link.png", "nan.png"),
    ("class without boxes", "train", "never has no box"),
    ("unreadable split", "test", "images/test does not exist"),
]


@linux
def test_every_planted_fault_is_found_in_one_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data, out = planted(tmp_path / "set"), tmp_path / "out.json"
    assert main(["check", "--data", str(data), "--json", str(out), "--all"]) == 1
    text = capsys.readouterr().out
    report = json.loads(out.read_text())
    for kind, place, why in FOUND:
        named = [
            problem
            for problem in report["problems"]
            if problem["kind"] == kind
            and problem["place"].endswith(place)
            and why in problem["text"]
        ]
        assert named, (kind, place, why)
        assert f"{named[0]['place']}: {named[0]['text']}" in text
    assert report["counts"]["wrong label"] == 8
    assert report["splits"]["val"]["per_class"] == {"a": 3, "b": 0, "never": 0}
    assert f"{report['faults']} faults" in text


@linux
@pytest.mark.parametrize("name", ["Screen 1.00\u202fPM", "b: c", "caf\udce9"])
def test_an_unusable_image_is_named_as_it_is(tmp_path: Path, name: str) -> None:
    """Its label file is found, whatever its name holds."""
    path = yolo_data(tmp_path / "set: a")
    image = path.parent / "images" / "val" / f"{name}.png"
    image.write_bytes(b"no image")
    write_label(path.parent / "labels" / "val" / f"{name}.txt", BOX)
    found = check_data(path)
    assert found.by_kind()["unusable image"][0].place == str(image)
    assert "label without image" not in found.by_kind()


def test_faults_of_a_coco_json(tmp_path: Path) -> None:
    content = coco_content()
    first = content["annotations"][0]
    content["annotations"] += [
        first | {"id": 3, "bbox": [70, 10, 60, 10]},
        first | {"id": 4, "bbox": [10, 10, -6, 10]},
        first | {"id": 5, "image_id": 99},
        first | {"id": 6},
        first | {"id": 7, "bbox": [1, 1, 0, 5]},
    ]
    report = check_data(coco_data(tmp_path, content))
    assert list(report.splits) == ["val"]
    kinds = {problem.kind for problem in report.problems}
    expected = ("box outside", "wrong label", "label without image", "duplicate label", "empty box")
    assert kinds.issuperset(expected)


def test_a_sound_data_set_has_no_faults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = yolo_data(tmp_path)
    (tmp_path / "images/val/b.jpg").unlink()
    (tmp_path / "images/val/c.jpg").unlink()
    (tmp_path / "labels/val/b.txt").unlink()
    pictures = tmp_path / "pictures"
    assert main(["check", "--data", str(path), "--pictures", str(pictures)]) == 0
    assert "no faults" in capsys.readouterr().out
    assert [picture.name for picture in pictures.iterdir()] == ["val.png"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--data", "nowhere"], "nowhere does not exist"),
        (["--data", "set", "--imgsz", "0"], "imgsz is 0"),
        (["--data", "set", "--variant", "v9"], "no variant 'v9'"),
    ],
)
def test_what_cannot_be_checked(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("split", ["[/red]", "\x1b[2J"])
def test_names_of_splits_are_shown_as_they_are(
    split: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = yolo_data(tmp_path)
    path.write_text(json.dumps({"names": ["cell", "dot"], split: "images/val"}))
    main(["check", "--data", str(path)])
    printed = capsys.readouterr().out
    assert f"{printable(split)}: 3 images" in printed
    assert "\x1b" not in printed
