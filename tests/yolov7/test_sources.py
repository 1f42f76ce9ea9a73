import os
import threading
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.yolov7.data_sets import linux
from tests.yolov7.pictures import greys, picture, png, write_video
from yolov7 import capture, items, sources
from yolov7.errors import UserError
from yolov7.letterbox import Image
from yolov7.sources import Source


def test_folders_globs_and_lists(tmp_path: Path) -> None:
    for name in ("b.png", "a.PNG", "sub/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(picture()))
    (tmp_path / "notes.txt").write_text("no image")

    def names(source: object) -> list[str]:
        return [str(Path(frame.path).relative_to(tmp_path)) for frame in Source(source)]

    assert names(tmp_path) == ["a.PNG", "b.png"]
    assert names(str(tmp_path / "**" / "*")) == ["a.PNG", "b.png", "sub/c.png"]
    assert names([tmp_path / "b.png", str(tmp_path / "sub")]) == ["b.png", "sub/c.png"]
    frames = list(Source(tmp_path))
    assert [(f.item, f.items, f.number, f.kind) for f in frames] == [
        (1, 2, 1, "image"),
        (2, 2, 1, "image"),
    ]


def test_many_images_stay_in_order(tmp_path: Path) -> None:
    for index in range(20):
        (tmp_path / f"{index:02}.png").write_bytes(png(np.full((4, 4), index * 10, np.uint8)))
    assert [int(frame.image[0, 0, 0]) for frame in Source(tmp_path)] == list(range(0, 200, 10))


def test_images_are_read_a_few_ahead_only(monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []

    def read(path: Path) -> Image:
        reads.append(str(path))
        return picture()

    monkeypatch.setattr(items, "read_image", read)
    frames = iter(Source([f"{index}.jpg" for index in range(100)]))
    next(frames)
    assert len(reads) < 10


def test_the_others_are_done_when_some_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "good.png").write_bytes(png(picture()))
    (tmp_path / "bad.png").write_bytes(b"bad")
    (tmp_path / "empty").mkdir()
    errors: list[UserError] = []
    source = [tmp_path / "absent.png", tmp_path, tmp_path / "empty", str(tmp_path / "*.jpg")]
    frames = list(Source(source, on_error=errors.append))
    assert [Path(frame.path).name for frame in frames] == ["good.png"]
    messages = "\n".join(map(str, errors))
    assert len(errors) == 4
    for part in ("absent.png: no such file", "bad.png: trunc", "without images", "matches no"):
        assert part in messages


def test_the_others_are_done_when_a_place_cannot_be_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forbidden(_: Path) -> Iterator[Path]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", forbidden)  # root may read every folder
    (tmp_path / "good.png").write_bytes(png(picture()))
    errors: list[UserError] = []
    names = ["x" * 300, "x" * 300 + ".mp4", tmp_path, "http://[::1/a.jpg", tmp_path / "good.png"]
    assert len(list(Source(names, on_error=errors.append))) == 1
    long, video, folder, url = map(str, errors)
    assert long == f"{names[0]}: cannot be read: File name too long"
    assert video == f"{names[1]}: cannot be read: File name too long"
    assert folder == f"{tmp_path}: cannot be read: Permission denied"
    assert url.startswith("http://[::1/a.jpg: Invalid IPv6 URL: check the address")


def test_without_a_handler_the_error_is_raised(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a folder without images or videos"):
        list(Source(tmp_path))


def test_arrays() -> None:
    image = picture()
    frame = next(iter(Source(image)))
    np.testing.assert_array_equal(frame.image, image)
    assert frame.path == "array 0"
    assert len(list(Source(np.stack([image, image])))) == 2
    assert next(iter(Source(np.full((5, 6), 65535, np.uint16)))).image.min() == 255


@pytest.mark.parametrize(
    ("array", "match"),
    [
        (np.zeros((4, 4, 2), np.uint8), "4x4x2 is not an image"),
        (np.zeros((0, 4, 3), np.uint8), "0x4x3 is not an image"),
        (np.zeros((4, 4, 3), np.float32), "pixels are float32"),
    ],
)
def test_arrays_that_are_no_images(array: np.ndarray, match: str) -> None:
    with pytest.raises(UserError, match=match):
        list(Source(array))


def test_tensors_are_rgb() -> None:
    image = picture()
    whole = torch.from_numpy(image).flip(2).permute(2, 0, 1)
    for tensor in (whole, whole.float() / 255, (whole.double() / 255)[None]):
        np.testing.assert_array_equal(next(iter(Source(tensor))).image, image)
    broken = torch.full((3, 2, 2), float("nan"))
    assert next(iter(Source(broken))).image.max() == 0


def test_a_tensor_of_0_to_255_is_refused_unless_it_is_uint8() -> None:
    with pytest.raises(UserError, match="tensor 0: values up to 255: give 0 to 1, or uint8"):
        list(Source(torch.full((3, 4, 4), 255.0)))
    assert next(iter(Source(torch.full((3, 4, 4), 1.005)))).image.max() == 255


def test_a_folder_that_is_called_like_a_camera(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("2024").mkdir()
    Path("2024/a.png").write_bytes(png(picture()))
    assert [frame.path for frame in Source("2024")] == ["2024/a.png"]
    with pytest.raises(UserError, match="the source is empty"):
        Source("")


def test_a_video_that_cannot_be_decoded_names_its_codec(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_video(tmp_path / "v.avi", 2)
    monkeypatch.setattr(sources, "next_frame", lambda *_: None)
    with pytest.raises(UserError, match=r"no frame that can be read: .* \(MJPG\) to H.264"):
        list(Source(path))


@pytest.mark.parametrize("source", [None, True, 1.5, {"a": 1}])
def test_other_kinds_are_refused(source: object) -> None:
    with pytest.raises(UserError, match="a source cannot be a"):
        Source(source)


def test_an_empty_list_is_refused() -> None:
    with pytest.raises(UserError, match="list of sources is empty"):
        Source([])


def test_video_frames_with_their_numbers(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.avi", 6)
    frames = list(Source(path))
    assert [frame.number for frame in frames] == [1, 2, 3, 4, 5, 6]
    assert {(f.kind, f.total, f.fps, f.image.shape) for f in frames} == {
        ("video", 6, 10.0, (48, 64, 3))
    }
    assert greys(Source(path)) == [0, 1, 2, 3, 4, 5]


def test_video_frames_with_their_time_stamps(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.avi", 5)
    assert [frame.time for frame in Source(path)] == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])
    assert [frame.time for frame in Source(path, vid_stride=2)] == pytest.approx([0, 0.2, 0.4])
    assert next(iter(Source(picture()))).time == 0


def test_video_stride(tmp_path: Path) -> None:
    source = Source(write_video(tmp_path / "v.avi", 7), vid_stride=3)
    assert greys(source) == [0, 3, 6]
    assert [frame.number for frame in source] == [1, 4, 7]
    with pytest.raises(UserError, match="vid_stride is 0"):
        Source(0, vid_stride=0)


def test_a_header_that_promises_too_much_ends_cleanly(tmp_path: Path) -> None:
    path = write_video(tmp_path / "v.avi", 40)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 9 // 10])
    frames = list(Source(path))
    assert 0 < len(frames) < 40
    assert frames[0].total > len(frames)


def test_broken_videos_are_reported_and_the_next_source_follows(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video at all")
    write_video(tmp_path / "b.avi", 2)
    errors: list[UserError] = []
    assert greys(Source(tmp_path, on_error=errors.append)) == [0, 1]
    assert "a.mp4: not a video that can be read" in str(errors[0])


def test_leaving_a_video_early_closes_it(tmp_path: Path) -> None:
    before = threading.active_count()
    frames = iter(Source(write_video(tmp_path / "v.avi", 50)))
    next(frames)
    frames.close()  # type: ignore[attr-defined]  # a generator
    assert threading.active_count() == before


@linux
def test_a_pipe_that_is_called_like_a_video_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.mp4")
    with pytest.raises(UserError, match="it is a pipe"):
        list(Source(tmp_path))


def test_a_video_that_opencv_trips_over_is_reported_and_the_next_follows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a.avi", "b.avi"):
        write_video(tmp_path / name, 2)
    whole, count = capture.next_frame, iter(range(9))

    def tripping(reader: cv2.VideoCapture, stride: int) -> tuple[Image, float] | None:
        if next(count) == 1:
            raise UserError("damaged (container)")
        return whole(reader, stride)

    monkeypatch.setattr(sources, "next_frame", tripping)
    errors: list[UserError] = []
    paths = [Path(frame.path).name for frame in Source(tmp_path, on_error=errors.append)]
    assert paths == ["a.avi", "b.avi", "b.avi"]
    assert str(errors[0]) == f"{tmp_path / 'a.avi'}: damaged (container) from frame 2 on"


@linux
def test_a_video_whose_name_is_not_utf8_is_refused(tmp_path: Path) -> None:
    name = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.avi")
    write_video(tmp_path / "v.avi", 2).rename(name)
    with pytest.raises(UserError, match=r"caf\\xe9.avi: OpenCV opens only names in UTF-8: rename"):
        list(Source(tmp_path))


@linux
def test_an_image_whose_name_is_not_utf8_is_read(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.png")).write_bytes(png(picture()))
    assert len(list(Source(tmp_path))) == 1
