"""Everything that is wrong with a data set, found in one pass and counted by its kind."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolov7.dataset import yolo
from yolov7.dataset.reader import READERS, known_splits, read_split
from yolov7.dataset.sample import Dataset, Problem
from yolov7.dataset.split import shared_images
from yolov7.errors import UserError
from yolov7.images import read_image
from yolov7.progress import progress

# What may be meant: it is told, and no fault.
NOTES = frozenset({"image without labels", "class without boxes", "tiny box"})
OUTSIDE = 0.01  # of the image's side that a box may reach beyond it, by rounding
TINY = 1.0  # pixels


@dataclass(frozen=True)
class Report:
    """What was found.

    Attributes:
        splits: The splits that could be read, by name.
        problems: Those of all splits, in the order in which they were found.
    """

    splits: dict[str, Dataset]
    problems: list[Problem]

    @property
    def faults(self) -> int:
        """How many of the problems are faults."""
        return sum(problem.kind not in NOTES for problem in self.problems)

    def by_kind(self) -> dict[str, list[Problem]]:
        """The problems of each kind, the most frequent kind first."""
        counts = Counter(problem.kind for problem in self.problems)
        return {
            kind: [problem for problem in self.problems if problem.kind == kind]
            for kind, _ in counts.most_common()
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON: splits (images, boxes, per_class), counts by kind, problems."""
        return {
            "splits": {
                name: {
                    "images": len(dataset.samples),
                    "boxes": dataset.boxes,
                    "per_class": dict(zip(dataset.names, per_class(dataset), strict=True)),
                }
                for name, dataset in self.splits.items()
            },
            "counts": {kind: len(found) for kind, found in self.by_kind().items()},
            "faults": self.faults,
            "problems": [problem._asdict() for problem in self.problems],
        }


def per_class(dataset: Dataset) -> list[int]:
    """Boxes of each class, without regions of many objects."""
    parts = [sample.labels.classes[~sample.labels.crowd] for sample in dataset.samples]
    classes = np.concatenate([np.zeros(0, np.int64), *parts])
    return [int(count) for count in np.bincount(classes, minlength=len(dataset.names))]


def check_data(spec: str | Path, splits: Sequence[str] = ()) -> Report:
    """Read, decode and compare everything.

    Args:
        spec: See `load_data`.
        splits: Which to look at; none: all that there are.

    Raises:
        UserError: There is no split.
    """
    read: dict[str, Dataset] = {}
    problems: list[Problem] = []
    for split in splits or known_splits(spec):
        try:
            read[split] = read_split(spec, split)
        except UserError as error:
            problems.append(Problem("unreadable split", f"{spec} {split}", str(error)))
    return Report(read, list(dict.fromkeys(problems + find_problems(read))))


def find_problems(splits: dict[str, Dataset], *, decode: bool = True) -> list[Problem]:
    """What was left out of the splits of a data set when they were read, and what else is wrong.

    Args:
        splits: By name.
        decode: Look into the images, too: whether they are damaged, and the same picture twice.
    """
    problems: list[Problem] = []
    pixels: dict[str, tuple[str, Path]] = {}  # split and file by the pixels' digest
    for split, dataset in splits.items():
        problems += dataset.skipped
        problems += dataset.problems
        if decode:
            problems += _image_problems(split, dataset, pixels)
        problems += _label_files(dataset)
        problems += _box_problems(dataset)
        for name, count in zip(dataset.names, per_class(dataset), strict=True):
            if not count:
                problems.append(Problem("class without boxes", split, f"{name} has no box"))
    problems += _between_splits(splits)
    return problems


def _image_problems(
    split: str, dataset: Dataset, pixels: dict[str, tuple[str, Path]]
) -> Iterator[Problem]:
    """Images that cannot be decoded, and those that were there before, whatever they are called."""
    with ThreadPoolExecutor(READERS) as pool:
        found = pool.map(_digest, (sample.path for sample in dataset.samples))
        shown = progress(found, f"decoding {split}", len(dataset.samples))
        for sample, digest in zip(dataset.samples, shown, strict=True):
            if isinstance(digest, Problem):
                yield digest
                continue
            other_split, other = pixels.setdefault(digest, (split, sample.path))
            if other == sample.path:
                continue
            kind = "duplicate image" if other_split == split else "image of two splits"
            yield Problem(kind, str(sample.path), f"the same picture as {other}")


def _digest(path: Path) -> str | Problem:
    """A digest of an image's pixels, or why it has none."""
    try:
        image = read_image(path)
    except UserError as error:
        return Problem.of("damaged image", path, error)
    digest = hashlib.blake2b(image.data, digest_size=16)
    digest.update(str(image.shape).encode())
    return digest.hexdigest()


def _label_files(dataset: Dataset) -> Iterator[Problem]:
    """In YOLO form, images without a label file and label files without an image."""
    if not dataset.label_files:
        return
    images = [sample.path for sample in dataset.samples]
    images += [Path(problem.place) for problem in dataset.skipped]
    labels = yolo.label_paths(images)
    expected = set(labels)
    folders = {label.parent for label in labels}
    for image, label in zip(images, labels, strict=True):
        if not label.exists():
            yield Problem("image without labels", str(image), f"there is no {label}")
    for folder in sorted(folders):
        for label in sorted(folder.glob("*.[tT][xX][tT]")):
            if label not in expected and label.name != "classes.txt":
                yield Problem("label without image", str(label), "no image of this name is listed")


def _box_problems(dataset: Dataset) -> Iterator[Problem]:
    """Boxes without area, of less than a pixel, beyond their image, and those of two classes."""
    samples, names = dataset.samples, dataset.names
    counts = [len(sample.labels.classes) for sample in samples]
    if not sum(counts):
        return
    owner = np.repeat(np.arange(len(samples)), counts)
    sides = np.array([(sample.width, sample.height) * 2 for sample in samples], float)[owner]
    boxes = np.concatenate([sample.labels.boxes for sample in samples]).astype(float)
    classes = np.concatenate([sample.labels.classes for sample in samples])
    crowd = np.concatenate([sample.labels.crowd for sample in samples])

    def told(kind: str, where: NDArray[np.bool_], text: Callable[[int], str]) -> Iterator[Problem]:
        for row in np.flatnonzero(where).tolist():
            corners = ", ".join(f"{value:.0f}" for value in boxes[row])
            said = f"{names[classes[row]]} at {corners} {text(row)}"
            yield Problem(kind, str(samples[owner[row]].path), said)

    size = boxes[:, 2:] - boxes[:, :2]
    empty = (size <= 0).any(1)
    outside = (boxes < -OUTSIDE * sides) | (boxes > (1 + OUTSIDE) * sides)
    _, first, same = np.unique(
        np.column_stack([owner, boxes, crowd]), axis=0, return_index=True, return_inverse=True
    )
    other = classes[first[same]]
    yield from told("empty box", empty, lambda _: "has no area")
    yield from told(
        "tiny box",
        (size < TINY).any(1) & ~empty,
        lambda row: f"is {size[row, 0]:.1f} x {size[row, 1]:.1f} pixels",
    )
    yield from told(
        "box outside",
        np.asarray(outside.any(1)),
        lambda row: f"of an image of {sides[row, 0]:.0f} x {sides[row, 1]:.0f}",
    )
    yield from told(
        "box of two classes",
        np.not_equal(other, classes),
        lambda row: f"is {names[other[row]]}, too",
    )


def _between_splits(read: dict[str, Dataset]) -> Iterator[Problem]:
    splits = list(read)
    for position, first in enumerate(splits):
        for second in splits[position + 1 :]:
            for path in shared_images(read[first], read[second]):
                yield Problem("image of two splits", str(path), f"is in {first} and {second}")
            differ = set(read[first].names) ^ set(read[second].names)
            if differ:
                text = f"{first} and {second} differ in {', '.join(sorted(differ)[:5])}"
                yield Problem("classes differ", second, text)
