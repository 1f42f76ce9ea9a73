"""Reading ahead: images by a few threads, videos by one, cameras so that the newest frame wins."""

import os
import ssl
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from threading import Condition, Event, Lock, Thread
from time import monotonic
from typing import TypeVar

import cv2
import numpy as np

from yolov7.errors import UserError
from yolov7.letterbox import Image
from yolov7.text import one_line

WAITING = 2
FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 30.0  # before a source that has dropped is opened again
TIMEOUTS = [cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, 10_000, cv2.CAP_PROP_READ_TIMEOUT_MSEC, 10_000]
FFMPEG_OPTIONS = "OPENCV_FFMPEG_CAPTURE_OPTIONS"

_environment = Lock()

T = TypeVar("T")


def ahead(
    calls: Iterable[Callable[[], T]], workers: int, *, waiting: int = WAITING
) -> Generator[T]:
    """Results of calls in their order, worked out by threads ahead of the reader.

    Args:
        calls: What is called.
        workers: Threads.
        waiting: Results that may wait for the reader, beside those at work.
    """
    pending: deque[Future[T]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        try:
            for call in calls:
                pending.append(pool.submit(call))
                if len(pending) == workers + waiting:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def open_capture(target: str | int, name: str, hint: str) -> cv2.VideoCapture:
    """OpenCV's reader of a video file, camera or stream.

    Args:
        target: Path, address or camera number.
        name: Stands in the error messages.
        hint: What to say where OpenCV finds nothing to read.

    Raises:
        UserError: It cannot be opened.
    """
    try:
        if isinstance(target, int):
            capture = cv2.VideoCapture(target)
        elif cv2.CAP_FFMPEG in cv2.videoio_registry.getBackends():
            target.encode()  # OpenCV ends the process at half a surrogate pair
            with _certificates_checked(target):
                # FFmpeg only: another reader prints addresses, with the passwords in them.
                capture = cv2.VideoCapture(target, cv2.CAP_FFMPEG, TIMEOUTS)
        else:
            target.encode()
            capture = cv2.VideoCapture(target)
    except UnicodeEncodeError:
        raise UserError(f"{name}: OpenCV opens only names in UTF-8: rename it") from None
    except cv2.error:  # the number does not fit, a container that its reader trips over
        raise UserError(f"{name}: {hint}") from None
    if not capture.isOpened():
        raise UserError(f"{name}: {hint}")
    return capture


@contextmanager
def _certificates_checked(target: str) -> Iterator[None]:
    """Have FFmpeg check the certificate of an https address, which it does not by itself.

    Its options go through the environment; what the user has set there stands. Where Python knows
    no file of certificates (Windows, some macOS), nothing is checked.
    """
    authorities = ssl.get_default_verify_paths().cafile
    if not target.startswith("https://") or not authorities:
        yield
        return
    with _environment:  # asked inside: what another thread has set for its own opening is no user's
        ours = FFMPEG_OPTIONS not in os.environ
        if ours:
            os.environ[FFMPEG_OPTIONS] = f"tls_verify;1|ca_file;{authorities}"
        try:
            yield
        finally:
            if ours:
                del os.environ[FFMPEG_OPTIONS]


def frame_rate(capture: cv2.VideoCapture) -> float:
    """Frames per second; 0 where the container says nothing, or nonsense."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if 0 < fps < 1000 else 0.0


def next_frame(capture: cv2.VideoCapture, stride: int) -> tuple[Image, float] | None:
    """The next frame and its time stamp in seconds, None where there is none.

    It leaves out ``stride - 1`` frames after it.

    Raises:
        UserError: OpenCV trips over what comes.
    """
    try:
        ok, image = capture.read()
        if not ok:
            return None
        time = capture.get(cv2.CAP_PROP_POS_MSEC) / 1e3
        for _ in range(stride - 1):
            capture.grab()
    except cv2.error as error:
        raise UserError(f"damaged ({one_line(error.err)})") from None
    return np.asarray(image, dtype=np.uint8), time


class Newest:
    """A thread that reads a camera or stream all the time and keeps its newest frame.

    Where no frame comes any more it opens the source again, after pauses of 1, 2, 4 and up to 30
    seconds, until `retry` seconds have gone without a frame.

    Args:
        name: Of the source, for messages.
        connect: Opens it.
        stride: Take every n-th frame.
        retry: Seconds; 0: the first interruption is the end.
        changed: Guards ``frame`` and ``news``; told of every new one, and of the end.

    Attributes:
        frame: The newest frame that nobody has taken, its number, from 1, and the seconds after
            which it came.
        news: What the reader is to be told: lines, and at the end the error that was the reason.
        dropped: Frames that were replaced before somebody took them.
        ended: No frame comes any more.
        fps: Frames per second; 0 where the source says nothing, or is not yet open.
    """

    def __init__(
        self,
        name: str,
        connect: Callable[[], cv2.VideoCapture],
        *,
        stride: int,
        retry: float,
        changed: Condition,
    ) -> None:
        self.frame: tuple[Image, int, float] | None = None
        self.news: list[str | Exception] = []
        self.dropped = 0
        self.ended = False
        self.fps = 0.0
        self._name, self._connect = name, connect
        self._stride, self._retry = stride, retry
        self._changed = changed
        self._number, self._start = 1, monotonic()
        self._stopped = Event()
        self._thread = Thread(target=self._run, daemon=True)
        self._thread.start()

    def take(self) -> tuple[tuple[Image, int, float] | None, list[str | Exception]]:
        """The newest frame and the news, each once; the caller holds ``changed``."""
        taken, self.frame, self.news = (self.frame, self.news), None, []
        return taken

    def stop(self) -> None:
        """Ask the thread to end."""
        self._stopped.set()

    def join(self, seconds: float) -> None:
        """Wait for it; one whose camera hangs dies with the process."""
        self._thread.join(max(0.0, seconds))

    def _run(self) -> None:
        error: Exception | None = None
        try:
            self._read_with_pauses()
        except Exception as caught:  # of whatever kind: the reader waits for it
            error = caught
        with self._changed:
            if error is not None and not self._stopped.is_set():
                self.news.append(error)
            self.ended = True
            self._changed.notify_all()

    def _read_with_pauses(self) -> None:
        last, pause = monotonic(), FIRST_PAUSE_S
        while not self._stopped.is_set():
            before = self._number
            reason = UserError(f"{self._name}: no frame comes any more: check the source")
            try:
                self._read()
            except UserError as error:
                reason = error
            if self._number > before:
                last, pause = monotonic(), FIRST_PAUSE_S
            left = last + self._retry - monotonic()
            if left <= 0:
                raise reason
            pause = min(pause, left)
            with self._changed:
                self.news.append(f"{reason}; trying again in {pause:.1f} s")
                self._changed.notify_all()
            self._stopped.wait(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    def _read(self) -> None:
        """Read until no frame comes."""
        capture = self._connect()
        try:
            self.fps = frame_rate(capture)
            while not self._stopped.is_set():
                read = next_frame(capture, self._stride)
                if read is None:
                    return
                with self._changed:
                    self.dropped += self.frame is not None
                    self.frame = read[0], self._number, monotonic() - self._start
                    self._changed.notify_all()
                self._number += self._stride
        except UserError as error:
            raise UserError(f"{self._name}: {error}") from None
        finally:
            capture.release()
