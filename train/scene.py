"""An image with its objects while it is being augmented, and the geometry that moves both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from yolov7.dataset.sample import Labels, Polygon
from yolov7.letterbox import GREY, Image, letterbox, letterbox_geometry
from yolov7.train.config import Augmentation

Boxes = NDArray[np.float32]
OUTLINE_POINTS = 200  # along an outline, beside its corners
MIN_SIDE = 2.0  # pixels of a box that is kept after a change of geometry
MAX_ASPECT = 20.0
MIN_AREA_LEFT = 0.1  # of a box that was cut; of an outline:
MIN_OUTLINE_LEFT = 0.01


@dataclass(frozen=True, eq=False)
class Scene:
    """An image and its objects.

    Args:
        image: `[H, W, 3]` uint8, BGR.
        classes: `[n]` int64.
        boxes: `[n, 4]` float32 x1, y1, x2, y2 in pixels.
        outlines: each object's outline in parts `[k, 2]`; empty where only the box is known.
    """

    image: Image
    classes: NDArray[np.int64]
    boxes: Boxes
    outlines: tuple[list[Polygon], ...]

    @classmethod
    def from_labels(cls, image: Image, labels: Labels, height: int, width: int) -> "Scene":
        """The trainable objects of an image that was `height` x `width` when it was labelled."""
        scale = np.array([image.shape[1] / width, image.shape[0] / height], np.float32)
        scene = cls(
            image,
            labels.classes,
            labels.boxes * np.tile(scale, 2),
            tuple([part * scale for part in outline] for outline in labels.polygons),
        )
        return scene.select(~labels.crowd).clipped()

    @property
    def shape(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.shape[0], self.image.shape[1]

    def select(self, keep: NDArray[np.bool_]) -> "Scene":
        """Only some of the objects."""
        if keep.all():
            return self
        outlines = tuple(o for o, k in zip(self.outlines, keep, strict=True) if k)
        return replace(self, classes=self.classes[keep], boxes=self.boxes[keep], outlines=outlines)

    def clipped(self) -> "Scene":
        """Objects cut at the image's border; those with nothing left are dropped."""
        height, width = self.shape
        limit = np.array([width, height], np.float32)
        boxes = np.clip(self.boxes, 0, np.tile(limit, 2))
        outlines = tuple([np.clip(p, 0, limit) for p in outline] for outline in self.outlines)
        scene = replace(self, boxes=boxes, outlines=outlines)
        return scene.select(np.all(boxes[:, 2:] > boxes[:, :2], axis=1))

    def add(self, classes: Sequence[int], boxes: Sequence[Boxes]) -> "Scene":
        """With further objects whose outlines are not known."""
        if not classes:
            return self
        return replace(
            self,
            classes=np.concatenate([self.classes, np.array(classes, np.int64)]),
            boxes=np.concatenate([self.boxes, np.stack(boxes).astype(np.float32)]),
            outlines=self.outlines + tuple([] for _ in classes),
        )


def assemble(image: Image, scenes: Sequence[Scene], places: Sequence[tuple[int, int]]) -> Scene:
    """Copy scenes into `image`, their top left corners at `places` (x, y), cut at its border."""
    height, width = image.shape[:2]
    boxes, outlines = [], []
    for scene, (x, y) in zip(scenes, places, strict=True):
        h, w = scene.shape
        x1, y1, x2, y2 = max(x, 0), max(y, 0), min(x + w, width), min(y + h, height)
        if x2 > x1 and y2 > y1:
            image[y1:y2, x1:x2] = scene.image[y1 - y : y2 - y, x1 - x : x2 - x]
        shift = np.array([x, y], np.float32)
        boxes.append(scene.boxes + np.tile(shift, 2))
        outlines += [[part + shift for part in outline] for outline in scene.outlines]
    classes = np.concatenate([scene.classes for scene in scenes])
    return Scene(image, classes, np.concatenate(boxes), tuple(outlines)).clipped()


def grey(height: int, width: int) -> Image:
    """An empty canvas."""
    return np.full((height, width, 3), GREY, np.uint8)


def letterboxed(scene: Scene, shape: tuple[int, int]) -> Scene:
    """The scene scaled into (height, width), grey around it."""
    height, width = scene.image.shape[:2]
    where = letterbox_geometry((height, width), shape)
    scale, (top, _, left, _) = np.array(where.ratio, np.float32), where.border
    shift = np.array((left, top), np.float32)
    return Scene(
        letterbox(scene.image, where),
        scene.classes,
        scene.boxes * np.tile(scale, 2) + np.tile(shift, 2),
        tuple([part * scale + shift for part in outline] for outline in scene.outlines),
    )


def perspective(
    scene: Scene, shape: tuple[int, int], config: Augmentation, rng: Generator
) -> Scene:
    """Rotate, scale, shear, shift at random around the centre, into an image of (height, width).

    Boxes are refitted to what is left of their outlines, or of their corners; objects of which too
    little is left are dropped. The outlines do not survive.
    """
    height, width = shape
    if _changes_nothing(config) and scene.shape == shape:
        return scene
    matrix, scale = _random_matrix(scene.shape, shape, config, rng)
    border = (GREY, GREY, GREY)
    half = np.array([[1, 0, 0.5], [0, 1, 0.5], [0, 0, 1]])  # OpenCV's pixel 0 has its centre at 0
    pixels = np.linalg.inv(half) @ matrix @ half
    if config.perspective:
        image = cv2.warpPerspective(scene.image, pixels, (width, height), borderValue=border)
    else:
        image = cv2.warpAffine(scene.image, pixels[:2], (width, height), borderValue=border)
    outlined = np.array([bool(outline) for outline in scene.outlines], np.bool_)
    boxes = _warp_boxes(scene.boxes, matrix)
    if outlined.any():
        outlines = [outline for outline in scene.outlines if outline]
        boxes[outlined] = _warp_outlines(outlines, matrix, shape)
    boxes = np.clip(boxes, 0, np.array([width, height, width, height], np.float32))
    before = np.prod(scene.boxes[:, 2:] - scene.boxes[:, :2], 1) * scale**2
    sides = boxes[:, 2:] - boxes[:, :2]
    least = np.where(outlined, MIN_OUTLINE_LEFT, MIN_AREA_LEFT)
    keep = (sides > MIN_SIDE).all(1) & (sides.prod(1) > least * before)
    keep &= sides.max(1, initial=0) < MAX_ASPECT * sides.min(1, initial=np.inf)
    empty: tuple[list[Polygon], ...] = tuple([] for _ in boxes)
    return Scene(np.asarray(image, np.uint8), scene.classes, boxes, empty).select(keep)


def _changes_nothing(config: Augmentation) -> bool:
    changes = config.degrees, config.shear, config.perspective, config.translate
    return not any(changes) and config.scale == 0


def _random_matrix(
    source: tuple[int, int], target: tuple[int, int], config: Augmentation, rng: Generator
) -> tuple[NDArray[np.float64], float]:
    """Map from source to target pixels `[3, 3]`, and its scale."""
    centre, projection, shear, shift = (np.eye(3) for _ in range(4))
    centre[:2, 2] = -source[1] / 2, -source[0] / 2
    projection[2, :2] = rng.uniform(-config.perspective, config.perspective, 2)
    angle = math.radians(rng.uniform(-config.degrees, config.degrees))
    scale = rng.uniform(1 - config.scale, 1.1 + config.scale) if config.scale else 1.0
    cos, sin = scale * math.cos(angle), scale * math.sin(angle)
    rotation = np.array([[cos, sin, 0], [-sin, cos, 0], [0, 0, 1]])
    lean = np.radians(rng.uniform(-config.shear, config.shear, 2))
    shear[0, 1], shear[1, 0] = np.tan(lean)
    shift[:2, 2] = rng.uniform(0.5 - config.translate, 0.5 + config.translate, 2) * target[::-1]
    return shift @ shear @ rotation @ projection @ centre, scale


def _warp_points(points: NDArray[np.float32], matrix: NDArray[np.float64]) -> NDArray[np.float32]:
    """Points `[..., 2]` through a projective map."""
    warped = points @ matrix[:, :2].T + matrix[:, 2]
    return np.asarray(warped[..., :2] / warped[..., 2:], np.float32)


def _warp_boxes(boxes: Boxes, matrix: NDArray[np.float64]) -> Boxes:
    """The boxes around the four warped corners of boxes `[n, 4]`."""
    corners = _warp_points(boxes[:, [0, 1, 2, 1, 2, 3, 0, 3]].reshape(-1, 4, 2), matrix)
    return np.concatenate([corners.min(1), corners.max(1)], 1)


def _warp_outlines(
    outlines: Sequence[list[Polygon]], matrix: NDArray[np.float64], shape: tuple[int, int]
) -> Boxes:
    """Boxes `[n, 4]` around what warped outlines show inside (height, width); zeros for nothing."""
    along = _along([part for outline in outlines for part in outline])
    points = _warp_points(np.concatenate(along), matrix)
    inside = ((points >= 0) & (points <= shape[::-1])).all(1, keepdims=True)
    low, high = (np.where(inside, points, side) for side in (np.inf, -np.inf))  # [points, 2]
    parts = np.cumsum([0, *map(len, along)])
    first = parts[np.cumsum([0, *map(len, outlines)])[:-1]]
    low, high = np.minimum.reduceat(low, first), np.maximum.reduceat(high, first)
    seen = (low <= high).all(1, keepdims=True)
    return np.where(seen, np.concatenate([low, high], 1), 0).astype(np.float32)


def _along(parts: Sequence[Polygon]) -> list[NDArray[np.float32]]:
    """Points `[k, 2]` of each closed polygon: its corners, and 200 along its edges.

    The points between matter where the image's border cuts an edge.
    """
    along = []
    for part in parts:
        at = np.arange(OUTLINE_POINTS) / OUTLINE_POINTS * len(part)
        corner = at.astype(np.int64)
        here, after = part[corner], part[(corner + 1) % len(part)]
        between = here + (at - corner)[:, None].astype(np.float32) * (after - here)
        along.append(np.concatenate([part, between]))
    return along


def flipped(scene: Scene, *, horizontally: bool) -> Scene:
    """The mirror image, left and right exchanged, or top and bottom."""
    axis = 0 if horizontally else 1
    extent = scene.shape[1 - axis]
    boxes = scene.boxes.copy()
    boxes[:, [axis, axis + 2]] = extent - scene.boxes[:, [axis + 2, axis]]
    outlines = tuple([part.copy() for part in outline] for outline in scene.outlines)
    for outline in outlines:
        for part in outline:
            part[:, axis] = extent - part[:, axis]
    image = cv2.flip(scene.image, 1 if horizontally else 0)
    return Scene(np.asarray(image, np.uint8), scene.classes, boxes, outlines)
