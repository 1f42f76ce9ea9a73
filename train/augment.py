"""From images of a data set to training images: mosaic, mixup, perspective, colour, flips."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import cv2
import numpy as np
from numpy.random import Generator

from yolov7.train.config import Augmentation
from yolov7.train.paste import copy_paste, gather, paste_in
from yolov7.train.scene import Scene, assemble, flipped, grey, letterboxed, perspective

MIXUP_BETA = 8.0


@dataclass(frozen=True, eq=False)
class Augmenter:
    """Makes a training image of a data set's images.

    Args:
        config: what happens to the images.
        size: side of the result in pixels.
        load: gives an image of the data set, its longer side scaled to `size`.
        count: images in the data set.
        outlined: images with outlined objects, which may be pasted in.
    """

    config: Augmentation
    size: int
    load: Callable[[int], Scene]
    count: int
    outlined: Sequence[int] = ()

    def __call__(
        self,
        index: int,
        shape: tuple[int, int],
        rng: Generator,
        others: Sequence[int] = (),
        *,
        mosaic: bool = True,
    ) -> Scene:
        """An augmented image of (height, width) that shows image `index`.

        A mosaic, which shows others too, is square whatever the shape.

        Args:
            index: of the image.
            shape: of the result.
            rng: draws all that is random.
            others: images that join it in mosaics, at least `OTHERS`; none: drawn from all alike.
            mosaic: whether it may be a mosaic.
        """
        config, left = self.config, iter(others)

        def draw(count: int) -> list[int]:
            if others:
                return list(islice(left, count))
            return [int(i) for i in rng.integers(self.count, size=count)]

        if rng.random() < config.mosaic and mosaic:
            scene = self._mosaic(index, draw, rng)
            if rng.random() < config.mixup:
                (second,) = draw(1)
                scene = mixup(scene, self._mosaic(second, draw, rng), rng)
        else:
            scene = perspective(letterboxed(self.load(index), shape), shape, config, rng)
        scene = jitter_colour(scene, config, rng)
        if rng.random() < config.paste_in:
            scene = paste_in(scene, gather(self.load, self.outlined, rng), rng)
        if rng.random() < config.flipud:
            scene = flipped(scene, horizontally=False)
        if rng.random() < config.fliplr:
            scene = flipped(scene, horizontally=True)
        return scene

    def _mosaic(self, index: int, draw: Callable[[int], list[int]], rng: Generator) -> Scene:
        nine = rng.random() < self.config.mosaic9
        scenes = [self.load(i) for i in (index, *draw(8 if nine else 3))]
        scene = (mosaic9 if nine else mosaic4)(scenes, self.size, rng)
        scene = copy_paste(scene, self.config.copy_paste, rng)
        return perspective(scene, (self.size, self.size), self.config, rng)


def mosaic4(scenes: Sequence[Scene], size: int, rng: Generator) -> Scene:
    """Four images around a random centre of a canvas of twice `size`."""
    x, y = rng.integers(size // 2, size * 3 // 2 + 1, size=2).tolist()
    top_left, top_right, bottom_left, _ = (scene.shape for scene in scenes)
    places = [
        (x - top_left[1], y - top_left[0]),
        (x, y - top_right[0]),
        (x - bottom_left[1], y),
        (x, y),
    ]
    return assemble(grey(2 * size, 2 * size), scenes, places)


def mosaic9(scenes: Sequence[Scene], size: int, rng: Generator) -> Scene:
    """Nine images, the first in the middle; a random window of twice `size` of them.

    The images of a row or column start or end where the widest or highest of the middle ones does.
    """
    order = (1, 2, 3, 4, 0, 5, 6, 7, 8)  # row by row
    grid = [scenes[i] for i in order]
    middle_width = max(scene.shape[1] for scene in grid[1::3])
    middle_height = max(scene.shape[0] for scene in grid[3:6])
    left, top = rng.integers(0, size + 1, size=2).tolist()
    places = []
    for i, scene in enumerate(grid):
        height, width = scene.shape
        x = (size - width, size, size + middle_width)[i % 3]
        y = (size - height, size, size + middle_height)[i // 3]
        places.append((x - left, y - top))
    return assemble(grey(2 * size, 2 * size), grid, places)


def mixup(a: Scene, b: Scene, rng: Generator) -> Scene:
    """Two images blended, with the objects of both (arXiv 1710.09412)."""
    ratio = rng.beta(MIXUP_BETA, MIXUP_BETA)
    image = cv2.addWeighted(a.image, ratio, b.image, 1 - ratio, 0)
    return Scene(
        np.asarray(image, np.uint8),
        np.concatenate([a.classes, b.classes]),
        np.concatenate([a.boxes, b.boxes]),
        a.outlines + b.outlines,
    )


def jitter_colour(scene: Scene, config: Augmentation, rng: Generator) -> Scene:
    """Hue, saturation and value each multiplied by 1 + U(-1, 1) x its strength."""
    strength = np.array([config.hsv_h, config.hsv_s, config.hsv_v])
    gains = 1 + rng.uniform(-1, 1, 3) * strength
    if not strength.any():
        return scene
    levels = np.arange(256)
    hue = (levels * gains[0] % 180).astype(np.uint8)
    others = [np.clip(levels * gain, 0, 255).astype(np.uint8) for gain in gains[1:]]
    table = np.stack([hue, *others], 1)[None]  # [1, 256, 3]
    hsv = cv2.LUT(cv2.cvtColor(scene.image, cv2.COLOR_BGR2HSV), table)
    image = cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)
    return replace(scene, image=np.asarray(image, np.uint8))
