"""What one labelled image and one split of a data set are, in whatever form they were written."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Polygon = NDArray[np.float32]  # [k, 2] x, y in pixels


@dataclass(frozen=True, eq=False, kw_only=True)
class Labels:
    """The boxes of one image, in pixels of the upright image.

    Attributes:
        classes: [n] int64, index into the names of the data set.
        boxes: [n, 4] float32, x1, y1, x2, y2 as written: not clipped, and in COCO form a few
            are empty (evaluation counts them, training drops them).
        polygons: For every box its outline in one or more parts; none where it has a box only.
        crowd: [n] bool, a region of many objects: no target for training, ignored by evaluation.
        areas: [n] float64, square pixels, which make a box small, medium or large.
    """

    classes: NDArray[np.int64]
    boxes: NDArray[np.float32]
    polygons: tuple[list[Polygon], ...]
    crowd: NDArray[np.bool_]
    areas: NDArray[np.float64]

    @classmethod
    def background(cls) -> "Labels":
        """The labels of an image without objects."""
        return cls(
            classes=np.zeros(0, np.int64),
            boxes=np.zeros((0, 4), np.float32),
            polygons=(),
            crowd=np.zeros(0, np.bool_),
            areas=np.zeros(0, np.float64),
        )


@dataclass(frozen=True, eq=False, kw_only=True)
class Sample:
    """One image of a data set with its labels.

    Attributes:
        labels: Its boxes.
        path: The image file.
        height: Pixels, upright (EXIF orientation applied).
        width: Pixels.
        image_id: The id of a COCO json, the number that the file's name is where all names of
            the data set are numbers, else the position in the data set.
    """

    labels: Labels
    path: Path
    height: int
    width: int
    image_id: int


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set.

    Attributes:
        samples: Labelled images, in the order of their paths (YOLO form) or of the json.
        names: Class names; their positions are the classes of the samples.
        category_ids: The id that each class has in a COCO json: the json's own, the 91-based ones
            for COCO's 80 names, else the class itself.
        skipped: One line for every image that is left out: its path and why.
    """

    samples: list[Sample]
    names: list[str]
    category_ids: list[int]
    skipped: list[str] = field(default_factory=list)
