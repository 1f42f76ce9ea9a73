"""The images of a data set as training reads them: scaled, and kept where there is room."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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
        self._ram: list[Image] = []
        if cache == "ram":
            with ThreadPoolExecutor(READERS) as pool:
                images = pool.map(self._read, samples)
                self._ram = list(progress(images, "reading images", len(samples)))

    def __call__(self, index: int) -> Scene:
        """Image `index` with its objects."""
        sample = self.samples[index]
        if self._ram:
            image = self._ram[index]
        elif self.cache == "disk":
            image = self._from_disk(sample)
        else:
            image = self._read(sample)
        return Scene.from_labels(image, sample.labels, sample.height, sample.width)

    def _read(self, sample: Sample) -> Image:
        longest = max(sample.height, sample.width)
        # The decoder of JPEG shrinks for nothing: a quarter of the pixels, a third of the time.
        shrink = next((factor for factor in (8, 4, 2) if longest >= factor * self.size), 1)
        image: NDArray[Any] = read_image(sample.path, shrink=shrink)
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
