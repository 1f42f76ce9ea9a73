"""Reading ahead: images by a few threads, videos by one, cameras so that the newest frame wins."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Condition, Thread
from typing import TypeVar

import cv2
import numpy as np

from yolov7.letterbox import Image

WAITING = 2

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


def open_capture(target: str | int) -> cv2.VideoCapture | None:
    """OpenCV's reader of a video file, camera or stream; None where it finds none."""
    try:
        capture = cv2.VideoCapture(target)
    except cv2.error:  # the number does not fit
        return None
    return capture if capture.isOpened() else None


def frame_rate(capture: cv2.VideoCapture) -> float:
    """Frames per second; 0 where the container says nothing, or nonsense."""
    fps = capture.get(cv2.CAP_PROP_FPS)
    return fps if 0 < fps < 1000 else 0.0


def next_frame(capture: cv2.VideoCapture, stride: int) -> Image | None:
    """The next frame, None where there is none; leaves out ``stride - 1`` frames after it."""
    ok, image = capture.read()
    if not ok:
        return None
    for _ in range(stride - 1):
        capture.grab()
    return np.asarray(image, dtype=np.uint8)


class Newest:
    """A thread that reads a camera or stream all the time and keeps its newest frame.

    Args:
        capture: What it reads, and releases at the end.
        stride: Take every n-th frame.
        changed: Guards ``frame``; told of every new one, and of the end.

    Attributes:
        frame: The newest frame that nobody has taken, and its number, from 1.
        dropped: Frames that were replaced before somebody took them.
        ended: No frame comes any more.
    """

    def __init__(self, capture: cv2.VideoCapture, stride: int, changed: Condition) -> None:
        self.frame: tuple[Image, int] | None = None
        self.dropped = 0
        self.ended = False
        self.fps = frame_rate(capture)
        self._changed = changed
        self._stopped = False
        self._thread = Thread(target=self._run, args=(capture, stride), daemon=True)
        self._thread.start()

    def take(self) -> tuple[Image, int] | None:
        """The newest frame, once; the caller holds ``changed``."""
        frame, self.frame = self.frame, None
        return frame

    def stop(self) -> None:
        """Ask the thread to end; one whose camera hangs dies with the process."""
        self._stopped = True
        self._thread.join(timeout=1)

    def _run(self, capture: cv2.VideoCapture, stride: int) -> None:
        number = 1
        while (image := next_frame(capture, stride)) is not None and not self._stopped:
            with self._changed:
                self.dropped += self.frame is not None
                self.frame = image, number
                self._changed.notify_all()
            number += stride
        capture.release()
        with self._changed:
            self.ended = True
            self._changed.notify_all()
