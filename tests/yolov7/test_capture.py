import os
import ssl
import threading
import time
from types import SimpleNamespace

import cv2
import numpy as np
import pytest

from yolov7 import capture, sources
from yolov7.errors import UserError
from yolov7.letterbox import Image
from yolov7.sources import Source


class Camera:
    """Gives grey frames 0, 1, 2, ... as fast as they are asked for, every 10 ms."""

    def __init__(self, *_: object) -> None:
        self.count = 0
        self.released = False

    def isOpened(self) -> bool:  # noqa: N802  # OpenCV's name
        return True

    def get(self, _: int) -> float:
        return float("nan")

    def grab(self) -> bool:
        self.count += 1
        return True

    def read(self) -> tuple[bool, Image | None]:
        time.sleep(0.01)
        if self.count >= 40:
            return False, None
        self.count += 1
        return True, np.full((2, 2, 3), self.count, np.uint8)

    def release(self) -> None:
        self.released = True


def test_the_newest_frame_wins_and_drops_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    errors: list[UserError] = []
    source = Source(0, on_error=errors.append)
    numbers, times = [], []
    for frame in source:
        times.append(frame.time)
        assert (frame.path, frame.kind, frame.fps) == ("camera 0", "live", 0.0)
        assert frame.image[0, 0, 0] == frame.number
        numbers.append(frame.number)
        time.sleep(0.05)
    assert source.live
    assert numbers == sorted(set(numbers))
    assert 0 < times[0] < 0.5
    assert times == sorted(set(times))
    assert 3 < len(numbers) < 20
    assert source.dropped == 40 - len(numbers)
    assert [str(error) for error in errors] == [
        "camera 0: no frame comes any more: check the source"
    ]


def test_several_cameras_run_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    seen = [frame.path for frame in Source(["0", 1], on_error=lambda _: None)]
    first = seen[: len(seen) // 2]
    assert {"camera 0", "camera 1"} == set(first)


def test_leaving_a_camera_early_releases_it(monkeypatch: pytest.MonkeyPatch) -> None:
    cameras: list[Camera] = []

    def opened(target: object) -> Camera:
        cameras.append(Camera(target))
        return cameras[-1]

    monkeypatch.setattr(cv2, "VideoCapture", opened)
    frames = iter(Source(0))
    next(frames)
    frames.close()  # type: ignore[attr-defined]  # a generator
    assert cameras[0].released


def test_leaving_cameras_that_hang_takes_a_second_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    free = threading.Event()
    first = Camera()

    def opened(target: int, *_: object) -> Camera:
        if target:
            free.wait(30)
        return first

    monkeypatch.setattr(sources, "open_capture", opened)
    monkeypatch.setattr(sources, "CLOSING_S", 0.2)
    frames = iter(Source(list(range(6))))
    next(frames)
    start = time.monotonic()
    frames.close()  # type: ignore[attr-defined]  # a generator
    assert time.monotonic() - start < 0.9  # six times .2 are 1.2
    assert first.released
    free.set()


def test_a_certificate_is_checked_for_each_of_two_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """The options of the first are not taken for the user's, and gone when the second opens."""
    known = SimpleNamespace(cafile="authorities")
    monkeypatch.setattr(ssl, "get_default_verify_paths", lambda: known)
    monkeypatch.delenv(capture.FFMPEG_OPTIONS, raising=False)
    seen: list[str | None] = []
    inside, entered = threading.Event(), threading.Event()

    def second() -> None:
        inside.set()
        with capture._certificates_checked("https://b"):
            entered.set()
            time.sleep(0.2)  # the first one leaves meanwhile, if it may be in there, too
            seen.append(os.environ.get(capture.FFMPEG_OPTIONS))

    with capture._certificates_checked("https://a"):
        thread = threading.Thread(target=second)
        thread.start()
        inside.wait()
        entered.wait(0.1)
    thread.join()
    assert seen == ["tls_verify;1|ca_file;authorities"]
    assert capture.FFMPEG_OPTIONS not in os.environ


@pytest.mark.parametrize("number", [63, 20240101123456])
def test_a_camera_that_is_not_there(number: int) -> None:
    with pytest.raises(UserError, match=f"camera {number}: cannot be opened"):
        list(Source(number))


def test_a_camera_is_released_when_the_next_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    camera = Camera(0)

    def opened(target: int, name: str, hint: str) -> Camera:
        if target == 1:
            raise UserError(f"{name}: {hint}")
        return camera

    monkeypatch.setattr(sources, "open_capture", opened)
    with pytest.raises(UserError, match="camera 1: cannot be opened"):
        list(Source([0, 1]))
    assert camera.released


def test_a_stream_that_drops_is_opened_again_until_it_stays_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(capture, "FIRST_PAUSE_S", 0.01)
    opened: list[Camera] = []

    def connect(target: object) -> Camera:
        if len(opened) == 2:
            raise cv2.error("gone")
        opened.append(Camera(target))
        return opened[-1]

    monkeypatch.setattr(cv2, "VideoCapture", connect)
    errors: list[UserError] = []
    notes: list[str] = []
    source = Source(0, retry=0.3, on_error=errors.append, on_note=notes.append)
    numbers = [frame.number for frame in source]
    assert numbers == sorted(set(numbers))
    assert 40 < numbers[-1] <= 80  # they go on
    assert all(camera.released for camera in opened)
    assert notes[0] == (
        "camera 0: no frame comes any more: check the source; trying again in 0.0 s"
    )
    assert "camera 0: cannot be opened" in notes[-1]
    assert [str(error) for error in errors] == [
        "camera 0: cannot be opened: check that it is there"
    ]
    with pytest.raises(UserError, match="retry is nan seconds"):
        Source(0, retry=float("nan"))


@pytest.mark.parametrize(
    ("error", "seen"), [(cv2.error("container"), UserError), (MemoryError(), MemoryError)]
)
def test_an_error_of_the_reading_thread_reaches_the_main_loop(
    monkeypatch: pytest.MonkeyPatch, error: Exception, seen: type[Exception]
) -> None:
    def read(_: Camera) -> tuple[bool, Image]:
        raise error

    monkeypatch.setattr(Camera, "read", read)
    monkeypatch.setattr(cv2, "VideoCapture", Camera)
    with pytest.raises(seen):
        list(Source(0))
