"""Data sets in YOLO form: images, and beside each a text file of boxes or polygons.

A line is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, coordinates as fractions of the
image's width and height. `.../images/a/b.jpg` has its labels in `.../labels/a/b.txt`; where no
folder of the path is called `images` they lie beside the image.
"""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from yolov7.dataset.description import native
from yolov7.dataset.sample import Labels, Polygon, Problem
from yolov7.errors import UserError
from yolov7.images import IMAGE_SUFFIXES
from yolov7.text import printable

LARGEST = 2**28  # bytes of a text: a list of two million images
SLACK = 0.01  # fractions that rounding carried out of 0..1 are meant
FIELDS = ("the class", "cx", "cy", "the width", "the height")


def list_images(entry: Path, root: Path) -> list[Path]:
    """The images that an entry of a data.yaml names: a folder, or a text file of paths.

    Args:
        entry: Folder (searched to the bottom, through links), one image, or a list of one path a
            line.
        root: Folder of the data set, where relative paths of a list start that do not exist
            beside the list.

    Returns:
        Paths in sorted order for a folder, as written for a list.

    Raises:
        UserError: There is nothing, or something that may not be read.
    """
    if os.path.isdir(entry):
        if (whole := entry.resolve()) == whole.parent:
            raise UserError(f"{entry} is the whole file system: name a folder of images")
        try:
            return sorted(_walk(entry, set()))
        except OSError as error:
            where = error.filename or entry
            raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    if not os.path.isfile(entry):
        raise UserError(f"{entry} does not exist: correct the path in the data.yaml")
    if entry.suffix.lower() in IMAGE_SUFFIXES:
        return [entry]
    lines = (line.strip() for line in _read_text(entry).splitlines())
    return [_locate(native(line), entry.parent, root) for line in lines if line]


def _walk(folder: Path, above: set[tuple[int, int]]) -> Iterator[Path]:
    """The images below a folder; a link that leads back into a folder above ends there."""
    status = os.stat(folder)
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                yield from _walk(folder / entry.name, above | {here})
            elif is_image(entry.name):
                yield folder / entry.name


def is_image(name: str) -> bool:
    """Whether a file is called as an image; `._a.jpg` is what macOS keeps beside one."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not name.startswith("._")


def _locate(path: Path, folder: Path, root: Path) -> Path:
    if path.is_absolute():
        return path
    beside = folder / path
    return beside if os.path.exists(beside) else root / path


def _in_place_of(images: str, labels: str) -> Callable[[Path], Path]:
    def place(image: Path) -> Path:
        parts = list(image.parts)
        for position in range(len(parts) - 2, -1, -1):
            if parts[position] == images:
                parts[position] = labels
                break
        return Path(*parts).with_suffix(".txt")

    return place


_STANDARD = _in_place_of("images", "labels")
# Where label files lie, the usual first.
_PLACES: tuple[Callable[[Path], Path], ...] = (
    _STANDARD,
    lambda image: image.with_suffix(".txt"),
    _in_place_of("images", "Labels"),
    _in_place_of("JPEGImages", "labels"),
    lambda image: _STANDARD(image).with_suffix(".TXT"),
    lambda image: _STANDARD(image).with_name(f"{image.name}.txt"),
)


def label_paths(images: list[Path]) -> list[Path]:
    """The text file that belongs to each image, whether it exists or not.

    They lie in the first of the usual places where any image has one.
    """
    for place in _PLACES:
        paths = [place(image) for image in images]
        if any(map(os.path.isfile, paths)):
            return paths
    return [_STANDARD(image) for image in images]


def read_labels(
    path: Path, size: tuple[int, int], classes: int, keypoints: int = 0
) -> tuple[Labels, list[Problem]]:
    """Read one label file; a missing or empty one belongs to a background image.

    Args:
        path: Text file.
        size: Height and width of the image in pixels.
        classes: How many the data set names.
        keypoints: Numbers after each box that belong to a pose.

    Returns:
        The labels, and what is left out.
    """
    try:
        text = _read_text(path)
    except FileNotFoundError:
        return Labels.background(), []
    except UserError as error:
        return Labels.background(), [
            Problem("wrong label", str(path), str(error).removeprefix(f"{path} "))
        ]
    rows: list[tuple[int, np.ndarray, Polygon | None]] = []
    problems: list[Problem] = []
    seen: set[str] = set()
    for number, line in enumerate(text.splitlines(), 1):
        row, place = " ".join(line.split()), f"{path}:{number}"
        if not row:
            continue
        if row in seen:
            problems.append(Problem("duplicate label", place, "says the same as a line above"))
            continue
        seen.add(row)
        try:
            index, box, polygon = _parse(row, size, classes, keypoints)
        except ValueError as error:
            problems.append(Problem("wrong label", place, str(error)))
            continue
        if box[2] <= box[0] or box[3] <= box[1]:
            problems.append(Problem("empty box", place, "the box has no area"))
        else:
            rows.append((index, box, polygon))
    return _labels(rows), problems


def _labels(rows: list[tuple[int, np.ndarray, Polygon | None]]) -> Labels:
    if not rows:
        return Labels.background()
    areas = [
        float(np.prod(box[2:] - box[:2])) if polygon is None else polygon_area(polygon)
        for _, box, polygon in rows
    ]
    return Labels(
        classes=np.array([index for index, _, _ in rows], np.int64),
        boxes=np.array([box for _, box, _ in rows], np.float32),
        polygons=tuple([] if polygon is None else [polygon] for _, _, polygon in rows),
        crowd=np.zeros(len(rows), np.bool_),
        areas=np.array(areas, np.float64),
    )


def _parse(
    row: str, size: tuple[int, int], classes: int, keypoints: int
) -> tuple[int, np.ndarray, Polygon | None]:
    """Class, box [4] and polygon in pixels of one line; ValueError says what is wrong with it."""
    fields = row.split()
    try:
        numbers = np.array([float(field) for field in fields])
    except ValueError:
        raise ValueError(f"{row[:80]!r} is not made of numbers") from None
    _check_count(fields, keypoints)
    for position in np.flatnonzero(~np.isfinite(numbers)).tolist():
        name = FIELDS[position] if position < len(FIELDS) else "a coordinate"
        raise ValueError(f"{name} is {fields[position]}")
    if numbers[0] != int(numbers[0]):
        raise ValueError(f"the class is {fields[0]}: it must be a whole number")
    index, values = int(numbers[0]), numbers[1:]
    if keypoints:
        values = values[:4]
    if not 0 <= index < classes:
        raise ValueError(
            f"class {index}, but the data set names {classes} classes (0 to {classes - 1}): "
            "correct the label or the names"
        )
    if values.min() < -SLACK or values.max() > 1 + SLACK:
        raise ValueError("coordinates must be fractions of the image's width and height, 0 to 1")
    height, width = size
    polygon = None
    if len(values) == 4:
        cx, cy, w, h = values * (width, height, width, height)
        box = np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2])
    else:
        points = values.reshape(-1, 2) * (width, height)
        box, polygon = np.concatenate([points.min(0), points.max(0)]), points.astype(np.float32)
    return index, box, polygon


def _check_count(fields: list[str], keypoints: int) -> None:
    count = len(fields)
    form = "a label is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`"
    if keypoints:
        if count != 5 + keypoints:
            raise ValueError(f"{count} numbers; by kpt_shape a label has {5 + keypoints}")
    elif count == 6:
        raise ValueError(f"6 numbers; leave the confidence out: {form}")
    elif count < 5 or count % 2 == 0:
        raise ValueError(f"{count} numbers; {form}")
    elif count == 7 and {*fields[5:]} <= {"0", "1"} and not {*fields[1:5]} <= {"0", "1"}:
        raise ValueError(f"7 numbers, two of them flags; {form}")


def polygon_area(polygon: Polygon) -> float:
    """Area in square pixels of a polygon [k, 2] (shoelace formula)."""
    x, y = polygon.astype(np.float64).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _read_text(path: Path) -> str:
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path} is no file")
        if status.st_size > LARGEST:
            raise UserError(f"{path} is no list or label: it is larger than {LARGEST >> 20} MB")
        return path.read_text(encoding="utf-8-sig")
    except (FileNotFoundError, UserError):
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {printable(error)}") from None
