import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.yolov7.data_sets import (
    BOX,
    assert_same,
    coco_content,
    coco_data,
    write_image,
    write_label,
    yolo_data,
)
from yolov7.dataset import load_data, reader

pytestmark = pytest.mark.usefixtures("cache_folder")


@pytest.fixture
def no_parsing(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    def parse(*_: object) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(reader, "_collect", parse)
    return monkeypatch


@pytest.mark.parametrize("make", [yolo_data, coco_data], ids=["yolo", "coco"])
def test_the_second_reading_comes_from_the_cache_and_is_the_same(
    tmp_path: Path, request: pytest.FixtureRequest, make: Any
) -> None:
    path = make(tmp_path / "set")
    write_image(tmp_path / "set/images/val/d.jpg").write_bytes(b"")  # one that is skipped
    before = sorted((tmp_path / "set").rglob("*"))
    first = load_data(path, "val")
    assert sorted((tmp_path / "set").rglob("*")) == before  # nothing is written among the data
    request.getfixturevalue("no_parsing")
    assert_same(load_data(path, "val"), first)


def touch_label(root: Path) -> None:
    """Another label of the same size, a moment later."""
    path = root / "labels/val/a.txt"
    text, status = path.read_text(), path.stat()
    path.write_text(text.replace(BOX, BOX.replace("0 0.5", "1 0.5", 1)))
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1000))


CHANGES = {
    "label edited": touch_label,
    "label added": lambda root: write_label(root / "labels/val/c.txt", BOX),
    "label removed": lambda root: (root / "labels/val/a.txt").unlink(),
    "image added": lambda root: write_image(root / "images/val/d.jpg"),
    "image removed": lambda root: (root / "images/val/a.jpg").unlink(),
    "image replaced": lambda root: write_image(root / "images/val/a.jpg", 20, 30),
    "classes renamed": lambda root: yolo_yaml(root, "names: [cell, spot]\nval: images/val\n"),
}


def yolo_yaml(root: Path, text: str) -> None:
    (root / "data.yaml").write_text(text)


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_the_cache_is_never_stale(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Any
) -> None:
    path = yolo_data(tmp_path)
    load_data(path, "val")
    change(tmp_path)
    cached = load_data(path, "val")
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path / "another"))
    assert_same(cached, load_data(path, "val"))


@pytest.mark.parametrize("what", ["json", "image"])
def test_the_cache_of_a_coco_json_is_never_stale(tmp_path: Path, what: str) -> None:
    path = coco_data(tmp_path)
    load_data(path, "val")
    if what == "json":
        content = coco_content()
        content["annotations"].pop()
        path.write_text(json.dumps(content))
        assert [len(s.labels.classes) for s in load_data(path, "val").samples] == [1, 0]
    else:
        (tmp_path / "val2017/3.jpg").unlink()
        assert [s.image_id for s in load_data(path, "val").samples] == [7]


def test_a_damaged_cache_is_read_again(tmp_path: Path, cache_folder: Path) -> None:
    path = yolo_data(tmp_path)
    first = load_data(path, "val")
    (entry,) = cache_folder.rglob("*.npz")
    for damage in (b"", entry.read_bytes()[:200], b"PK" + bytes(500)):
        entry.write_bytes(damage)
        assert_same(load_data(path, "val"), first)


def test_a_cache_that_cannot_be_written_is_done_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path / "file"))
    path = yolo_data(tmp_path)
    assert_same(load_data(path, "val"), load_data(path, "val"))
