"""What one labelled image and one split of a data set are, in whatever form they were written."""

from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from yolov7.errors import UserError
from yolov7.text import counted, printable

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


class Problem(NamedTuple):
    """Something wrong in a data set, which is left out or stands as it is.

    Attributes:
        kind: What it is a case of, such as "duplicate label".
        place: The file, with its line or the id of the entry where it has such.
        text: What is wrong.
    """

    kind: str
    place: str
    text: str

    def __str__(self) -> str:
        """One line."""
        return printable(f"{self.place}: {self.text}")

    @classmethod
    def of(cls, kind: str, path: Path, error: UserError) -> "Problem":
        """What an error says of a file, which it names first."""
        return cls(kind, str(path), str(error).removeprefix(printable(f"{path}: ")))


@dataclass(frozen=True, eq=False)
class Dataset:
    """One split of a data set.

    Attributes:
        samples: Labelled images, in the order of their paths (YOLO form) or of the json.
        names: Class names; their positions are the classes of the samples.
        category_ids: The id that each class has in a COCO json: the json's own, the 91-based ones
            for COCO's 80 names, else the class itself.
        skipped: The images that are left out.
        problems: What else is left out: labels that are wrong or come twice.
        label_files: Whether every image has a label file of its own, as in YOLO form.
    """

    samples: list[Sample]
    names: list[str]
    category_ids: list[int]
    skipped: list[Problem] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    label_files: bool = False

    @property
    def boxes(self) -> int:
        """Number of boxes, without regions of many objects."""
        return sum(int((~sample.labels.crowd).sum()) for sample in self.samples)

    def summary(self) -> str:
        """One line: `87 images (3 without boxes), 967 boxes of 3 classes; left out: 2 images`."""
        empty = sum(not len(sample.labels.classes) for sample in self.samples)
        without = f" ({empty} without boxes)" if empty else ""
        line = (
            f"{len(self.samples)} images{without}, {self.boxes} boxes of {len(self.names)} classes"
        )
        counts = Counter(problem.kind for problem in self.problems)
        counts.update(["image"] * len(self.skipped))
        out = ", ".join(counted(number, kind) for kind, number in counts.items())
        return line + (f"; left out: {out}" if out else "")

    def matched(self, names: list[str]) -> "Dataset":
        """The data set with its classes counted as others do it, where these are the same names."""
        return self.in_order(names) if set(names) == set(self.names) else self

    def in_order(self, names: list[str]) -> "Dataset":
        """The data set with its classes in the order of `names`, which are the same names."""
        if names == self.names:
            return self
        place = {name: index for index, name in enumerate(names)}
        number = np.array([place[name] for name in self.names], np.int64)
        ids = [self.category_ids[self.names.index(name)] for name in names]
        samples = [
            replace(sample, labels=replace(sample.labels, classes=number[sample.labels.classes]))
            for sample in self.samples
        ]
        return replace(self, samples=samples, names=list(names), category_ids=ids)
