"""Objects cut out along their outlines and pasted elsewhere (arXiv 2012.07177)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolov7.dataset.sample import Polygon
from yolov7.letterbox import Image
from yolov7.train.scene import Boxes, Scene, flipped

MAX_COVERED = 0.3  # share of an object that a pasted one may cover
OFFERED = 30  # cut-outs for one image, from at most
GATHERED = 8  # others: COCO's have 4 each
SIZES = (0.75,) * 2 + (0.5,) * 4 + (0.25,) * 4 + (0.125,) * 4 + (0.0625,) * 6  # of the image
SKIPPED = 0.2  # probability that a size is left out
MIN_PLACE = 20  # pixels a side of the rectangle to fill
MIN_SIDE = 10  # pixels a side of a cut-out
MIN_PIXELS = 60


@dataclass(frozen=True, eq=False)
class CutOut:
    """An object alone: `image` [h, w, 3] and `mask` [h, w] (0 or 255), uint8."""

    image: Image
    mask: NDArray[np.uint8]
    class_: int


def _mask(outline: Sequence[Polygon], shape: tuple[int, int]) -> NDArray[np.uint8]:
    """An outline filled with 255 on an image of (height, width)."""
    mask = np.zeros(shape, np.uint8)
    parts = [np.round(part).astype(np.int32) for part in outline]
    cv2.fillPoly(mask, parts, 255)
    return mask


def cut_out(scene: Scene, index: int) -> CutOut | None:
    """One object of a scene; None if it is too small or only a box."""
    x1, y1 = np.floor(scene.boxes[index, :2]).astype(int)
    x2, y2 = np.ceil(scene.boxes[index, 2:]).astype(int)
    if not scene.outlines[index] or min(x2 - x1, y2 - y1) < MIN_SIDE:
        return None
    shift = np.array([x1, y1], np.float32)
    mask = _mask([part - shift for part in scene.outlines[index]], (y2 - y1, x2 - x1))
    if np.count_nonzero(mask) < MIN_PIXELS:
        return None
    return CutOut(scene.image[y1:y2, x1:x2].copy(), mask, int(scene.classes[index]))


def gather(load: Callable[[int], Scene], images: Sequence[int], rng: Generator) -> list[CutOut]:
    """Cut out half of the outlined objects of random images, until there are enough.

    Args:
        load: gives the scene of an image.
        images: those with outlined objects.
        rng: draws images and objects.
    """
    found: list[CutOut] = []
    for image in rng.permutation(len(images))[:GATHERED]:
        scene = load(images[image])
        outlined = np.flatnonzero([bool(outline) for outline in scene.outlines])
        chosen = rng.permutation(outlined)[: (len(outlined) + 1) // 2]
        found += [cut for i in chosen if (cut := cut_out(scene, int(i))) is not None]
        if len(found) >= OFFERED:
            break
    return found


def _covered(box: Boxes, boxes: Boxes) -> float:
    """The largest share of any of `boxes` [n, 4] that `box` [4] covers."""
    low, high = np.maximum(box[:2], boxes[:, :2]), np.minimum(box[2:], boxes[:, 2:])
    inside = np.prod(np.clip(high - low, 0, None), 1)
    area = np.prod(boxes[:, 2:] - boxes[:, :2], 1)
    return float((inside / np.maximum(area, 1e-9)).max(initial=0))


def paste_in(scene: Scene, cuts: Sequence[CutOut], rng: Generator) -> Scene:
    """Fill free rectangles of random sizes and places with objects."""
    if not cuts:
        return scene
    height, width = scene.shape
    image = scene.image.copy()
    taken, classes, added = scene.boxes, [], []
    for size in SIZES:
        skipped = rng.random() < SKIPPED
        w, h = (int(rng.uniform(1, max(1, size * side))) for side in (width, height))
        x, y = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
        cut = cuts[int(rng.integers(len(cuts)))]
        place = np.array([x, y, x + w, y + h], np.float32)
        if skipped or min(w, h) <= MIN_PLACE or _covered(place, taken) >= MAX_COVERED:
            continue
        ratio = min(w / cut.mask.shape[1], h / cut.mask.shape[0])
        w, h = (round(side * ratio) for side in cut.mask.shape[::-1])
        if min(w, h) < MIN_SIDE:
            continue
        mask = cv2.resize(cut.mask, (w, h), interpolation=cv2.INTER_NEAREST) > 0
        if np.count_nonzero(mask) < MIN_PIXELS:
            continue
        image[y : y + h, x : x + w][mask] = cv2.resize(cut.image, (w, h))[mask]
        box = np.array([x, y, x + w, y + h], np.float32)
        taken = np.concatenate([taken, box[None]])
        classes.append(cut.class_)
        added.append(box)
    return replace(scene, image=image).add(classes, added)


def copy_paste(scene: Scene, share: float, rng: Generator) -> Scene:
    """Copy a share of the outlined objects to where they would be in the mirrored image."""
    outlined = np.flatnonzero([bool(outline) for outline in scene.outlines])
    count = round(share * len(outlined))
    if not count:
        return scene
    mirror = flipped(scene, horizontally=True)
    image, keep = scene.image.copy(), np.zeros(len(scene.boxes), np.bool_)
    taken = scene.boxes
    for i in rng.choice(outlined, count, replace=False):
        if _covered(mirror.boxes[i], taken) < MAX_COVERED:
            mask = _mask(mirror.outlines[i], scene.shape) > 0
            image[mask] = mirror.image[mask]
            taken = np.concatenate([taken, mirror.boxes[i : i + 1]])
            keep[i] = True
    copies = mirror.select(keep)
    return Scene(
        image,
        np.concatenate([scene.classes, copies.classes]),
        np.concatenate([scene.boxes, copies.boxes]),
        scene.outlines + copies.outlines,
    )
