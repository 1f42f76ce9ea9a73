"""What can be a source, beside files, cameras and arrays."""

import gc
import io
import os
import re
import sys
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch

from tests.yolov7.pictures import picture, png, write_video
from yolov7 import buckets
from yolov7.errors import UserError
from yolov7.letterbox import Image
from yolov7.sources import Frame, Source


def read(source: object) -> Image:
    (frame,) = Source(source)
    return frame.image


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1", "CMYK", "I;16"])
def test_pil_images_tell_their_channels(mode: str) -> None:
    pil = pytest.importorskip("PIL.Image")
    image = pil.fromarray(picture()[:, :, ::-1].copy())
    if mode == "I;16":
        sixteen = np.full((4, 5), 40000, np.uint16)
        np.testing.assert_array_equal(read(pil.fromarray(sixteen)), 156)
        return
    image = image.convert(mode)
    expected = np.asarray(image.convert("RGB"))[:, :, ::-1]
    np.testing.assert_array_equal(read(image), expected)


def test_pil_images_are_called_as_their_file_and_lie_as_they_are(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    image = pil.fromarray(picture(8, 16))
    exif = image.getexif()
    exif[274] = 6  # a quarter turn
    image.save(tmp_path / "a.png", exif=exif)
    with pil.open(tmp_path / "a.png") as opened:
        (frame,) = Source(opened)
        assert (frame.path, frame.shape) == (str(tmp_path / "a.png"), (8, 16))
    assert next(iter(Source(image))).path == "image"


def test_pil_images_that_cannot_be_read_are_one_line(tmp_path: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    with pytest.raises(UserError, match="pixels of mode F: convert it to"):
        read(pil.fromarray(np.zeros((4, 4), np.float32)))
    (tmp_path / "cut.png").write_bytes(png(picture(90, 90))[:900])
    with (
        pil.open(tmp_path / "cut.png") as opened,
        pytest.raises(UserError, match=r"cut\.png: PIL cannot decode it"),
    ):
        read(opened)


def test_bytes_and_files(tmp_path: Path) -> None:
    data = png(picture())
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, bytearray(data), memoryview(data), io.BytesIO(data)):
        np.testing.assert_array_equal(read(source), picture())
    with (tmp_path / "a.png").open("rb") as file:
        (frame,) = Source([file])
    np.testing.assert_array_equal(frame.image, picture())
    assert frame.path == str(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"no image", "bytes: truncated, or not an image"),
        (io.BytesIO(), r"file: empty, or read to its end before: go back with seek\(0\)"),
        (io.StringIO("text"), r"file: its read\(\) gives str, not bytes: open it with mode 'rb'"),
        (cv2.VideoCapture(), r"file: its read\(\) gives tuple, not bytes"),
    ],
    ids=["bytes", "empty", "text", "no file"],
)
def test_files_that_cannot_be_read_are_one_line(source: object, message: str) -> None:
    errors: list[UserError] = []
    assert [frame.path for frame in Source([source, picture()], on_error=errors.append)] == [
        "array 0"
    ]
    assert len(errors) == 1
    with pytest.raises(UserError, match=message):
        raise errors[0]


def test_path_likes_and_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(png(picture()))
    with os.scandir(tmp_path) as entries:
        assert len(list(Source(list(entries)))) == 1
    monkeypatch.setenv("HOME", str(tmp_path))
    names = [frame.path for frame in Source(["~/a.png", "~", "~/*.png"])]
    assert names == [str(tmp_path / "a.png")] * 3
    with pytest.raises(UserError, match=r"~no-such-user/a\.png: cannot be read: "):
        list(Source("~no-such-user/a.png"))
    monkeypatch.chdir(tmp_path)
    Path("~").mkdir()
    Path("~/b.png").write_bytes(png(picture()))
    assert [frame.path for frame in Source("~")] == ["~/b.png"]


def test_a_list_of_sources_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("lists/beside.png", "here.png", "away/far.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(picture()))
    write_video(tmp_path / "lists" / "v.avi", 2)
    monkeypatch.chdir(tmp_path)
    lines = ["\ufeffbeside.png", "", " here.png\r", str(tmp_path / "away"), "v.avi"]
    Path("lists/all.txt").write_text("\n".join(lines), encoding="utf-8")
    frames = list(Source("lists/all.txt"))
    names = ["beside.png", "here.png", "far.png", "v.avi", "v.avi"]
    assert [Path(frame.path).name for frame in frames] == names
    assert [frame.item for frame in frames] == [1, 2, 3, 4, 4]
    assert {frame.items for frame in frames} == {4}


def test_lists_that_hold_nothing_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "image.txt").write_bytes(png(picture()))
    (tmp_path / "self.txt").write_text("self.txt\n")
    errors: list[UserError] = []
    names = ["empty.txt", "image.txt", "self.txt", "absent.txt"]
    assert not list(Source([tmp_path / name for name in names], on_error=errors.append))
    empty, image, itself, absent = map(str, errors)
    assert "an empty list: name a source a line" in empty
    assert "image.txt: no list of sources: 'utf-8'" in image
    assert "names the list self.txt: name its sources" in itself
    assert "absent.txt: no such file" in absent


def test_a_generator_is_asked_for_a_frame_at_a_time() -> None:
    asked: list[int] = []

    def frames() -> Iterator[Image]:
        for number in range(1000):
            asked.append(number)
            yield np.full((4, 6, 3), number % 256, np.uint8)

    seen: list[Frame] = []
    for frame in Source(frames()):
        assert len(asked) == len(seen) + 1
        seen.append(frame)
        if len(seen) == 3:
            break
    assert [(frame.item, frame.items, int(frame.image[0, 0, 0])) for frame in seen] == [
        (1, 0, 0),
        (2, 0, 1),
        (3, 0, 2),
    ]


def test_a_generator_keeps_no_frame() -> None:
    alive: list[weakref.ref[Image]] = []

    def frames() -> Iterator[Image]:
        for _ in range(10):
            image = picture()
            alive.append(weakref.ref(image))
            yield image
            del image

    for _ in Source(frames()):
        gc.collect()
        assert sum(image() is not None for image in alive) <= 3


def test_what_is_iterated_over_may_give_any_source(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(picture()))
    video = write_video(tmp_path / "v.avi", 2)
    batches = torch.zeros(2, 3, 4, 4)
    frames = list(Source([(x for x in (tmp_path / "a.png", batches, video)), picture()]))
    assert [(Path(f.path).name, f.item, f.number) for f in frames] == [
        ("a.png", 1, 1),
        ("tensor 0", 2, 1),
        ("tensor 1", 3, 1),
        ("v.avi", 4, 1),
        ("v.avi", 4, 2),
        ("array 0", 5, 1),
    ]


def test_a_wrong_member_is_reported_and_the_next_follows() -> None:
    errors: list[UserError] = []
    frames = list(Source(iter([{"a": 1}, 0, "absent.png", picture()]), on_error=errors.append))
    assert len(frames) == 1
    wrong, camera, absent = map(str, errors)
    assert wrong.startswith("a source cannot be a dict: give a path, URL,")
    assert camera == "camera 0: give cameras and streams in a list"
    assert absent.startswith("absent.png: no such file")


@pytest.fixture
def bucket() -> Iterator[Any]:
    """A store that lies in memory."""
    fsspec = pytest.importorskip("fsspec")
    store = fsspec.filesystem("memory")
    yield store
    store.rm("/shop", recursive=True)


def test_object_stores(bucket: Any) -> None:
    images = {name: picture(8, 4 + index) for index, name in enumerate("abc")}
    for name, image in images.items():
        bucket.pipe(f"/shop/photos/{name}.png", png(image))
    bucket.pipe("/shop/photos/notes.md", b"#")
    bucket.pipe("/shop/empty/notes.md", b"#")
    for source in ("memory://shop/photos", "memory://shop/photos/", "memory://shop/*/*.png"):
        frames = list(Source(source))
        assert [frame.path for frame in frames] == [
            f"memory:///shop/photos/{name}.png" for name in "abc"
        ]
        for frame, image in zip(frames, images.values(), strict=True):
            np.testing.assert_array_equal(frame.image, image)
    np.testing.assert_array_equal(read("memory://shop/photos/b.png"), images["b"])
    bucket.pipe("/shop/what[1].png", png(images["c"]))  # no pattern
    np.testing.assert_array_equal(read("memory://shop/what[1].png"), images["c"])


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("memory://shop/none.png", "memory://shop/none.png: cannot be read: FileNotFoundError"),
        ("memory://shop/empty", "memory://shop/empty: no images there"),
        ("memory://shop/*.webp", r"memory://shop/\*.webp: no images there"),
        ("memory://shop/text.png", "memory://shop/text.png: truncated, or not an image"),
        ("s3://key:secret@bucket/a.png", "s3:// needs a package: pip install s3fs"),
    ],
)
def test_object_stores_that_fail(
    address: str, message: str, bucket: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    bucket.pipe("/shop/empty/notes.md", b"#")
    bucket.pipe("/shop/text.png", b"hello")
    errors: list[UserError] = []
    (frame,) = Source([address, picture()], on_error=errors.append)
    assert frame.path == "array 0"
    assert re.match(message, str(errors[0]))
    assert "secret" not in str(errors[0])


def test_an_image_in_a_store_may_be_too_large(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buckets, "LARGEST", 100)
    bucket.pipe("/shop/a.png", b"x" * 101)
    with pytest.raises(UserError, match=r"a\.png: over the limit"):
        read("memory://shop/a.png")
