"""The images of a data set as training reads them: scaled, and kept where there is room."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import chain
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from yolov7.atomic import atomic
from yolov7.cache import cache_folder
from yolov7.dataset import Sample
from yolov7.errors import UserError
from yolov7.images import read_image
from yolov7.letterbox import Image
from yolov7.progress import progress
from yolov7.train.scene import Scene

CacheKind = Literal["none", "ram", "disk"]
READERS = 8  # threads that fill the RAM cache


class ImageStore:
    """The images of a data set, their longer side scaled to `size`.

    Args:
        samples: the images.
        size: pixels.
        cache: keep scaled images in RAM (read at once), on the disk (in the user's cache folder,
            when first read), or not.
    """

    def __init__(self, samples: list[Sample], size: int, cache: CacheKind = "none") -> None:
        self.samples = samples
        self.size = size
        self.cache = cache
        self._unreadable: dict[int, str] = {}  # why, by index
        self._notes: list[str] = []
        self._ram: list[Image | None] = []
        if cache == "ram":
            with ThreadPoolExecutor(READERS) as pool:
                images = pool.map(self._try, range(len(samples)))
                self._ram = list(progress(images, "reading images", len(samples)))

    def __call__(self, index: int) -> Scene:
        """Image `index` with its objects; in place of one that cannot be read, the next that can.

        Raises:
            UserError: none can.
        """
        count = len(self.samples)
        for place in chain(range(index, count), range(index)):
            image = self._ram[place] if self._ram else self._try(place)
            if image is not None:
                sample = self.samples[place]
                return Scene.from_labels(image, sample.labels, sample.height, sample.width)
            self._notes.append(f"left out, another in its place: {self._unreadable[place]}")
        raise UserError(f"none of {count} images can be read: {self._unreadable[index]}")

    def take_notes(self) -> tuple[str, ...]:
        """What there is to be said since the last time."""
        notes, self._notes = tuple(dict.fromkeys(self._notes)), []
        return notes

    def _try(self, index: int) -> Image | None:
        """An image; None where it cannot be read, which is remembered."""
        sample = self.samples[index]
        if index in self._unreadable:
            return None
        try:
            return self._from_disk(sample) if self.cache == "disk" else self._read(sample)
        except UserError as error:
            self._unreadable[index] = str(error)
        except Exception as error:  # whatever a decoder or a file system raises
            self._unreadable[index] = f"{sample.path}: {type(error).__name__} {error}"
        return None

    def _read(self, sample: Sample) -> Image:
        longest = max(sample.height, sample.width)
        # The decoder of JPEG shrinks for nothing: a quarter of the pixels, a third of the time.
        shrink = next((factor for factor in (8, 4, 2) if longest >= factor * self.size), 1)
        image: NDArray[Any] = read_image(sample.path, shrink=shrink)
        # Of a shrunk JPEG the sides are rounded.
        if abs(image.shape[0] - sample.height * image.shape[1] / sample.width) > 2:
            raise UserError(f"{sample.path}: has changed since the data set was read")
        ratio = self.size / longest
        width, height = (max(1, round(side * ratio)) for side in (sample.width, sample.height))
        if image.shape[:2] != (height, width):
            image = cv2.resize(image, (width, height))
        return np.asarray(image, np.uint8)

    def _from_disk(self, sample: Sample) -> Image:
        status = sample.path.stat()
        key = f"{sample.path.resolve()} {status.st_size} {status.st_mtime_ns} {self.size}"
        file = cache_folder("images") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        try:
            return np.asarray(np.load(file), np.uint8)
        except (OSError, ValueError, EOFError):
            image = self._read(sample)
        # A disk that is full or read-only makes the epochs to come slower, no more.
        with suppress(UserError), atomic(file, durable=False) as temporary:
            np.save(temporary, image)
        return image
