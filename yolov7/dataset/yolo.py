"""Data sets in YOLO form: images, and beside each a text file of boxes or polygons.

A line is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`, coordinates as fractions of the
image's width and height. `.../images/a/b.jpg` has its labels in `.../labels/a/b.txt`; where no
folder of the path is called `images` they lie beside the image.
"""

from pathlib import Path

import numpy as np

from yolov7.dataset.sample import Labels, Polygon
from yolov7.errors import UserError
from yolov7.images import IMAGE_SUFFIXES

SLACK = 0.01  # fractions that rounding carried out of 0..1 are meant


def list_images(entry: Path, root: Path) -> list[Path]:
    """The images that an entry of a data.yaml names: a folder, or a text file of paths.

    Args:
        entry: Folder (searched to the bottom), one image, or a list of one path a line.
        root: Folder of the data set, where relative paths of a list start that do not exist
            beside the list.

    Returns:
        Paths in sorted order for a folder, as written for a list.
    """
    if entry.is_dir():
        return sorted(path for path in entry.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    if not entry.is_file():
        raise UserError(f"{entry} does not exist: correct the path in the data.yaml")
    if entry.suffix.lower() in IMAGE_SUFFIXES:
        return [entry]
    lines = (line.strip() for line in _read_text(entry).splitlines())
    return [_locate(Path(line), entry.parent, root) for line in lines if line]


def _locate(path: Path, folder: Path, root: Path) -> Path:
    if path.is_absolute():
        return path
    beside = folder / path
    return beside if beside.exists() else root / path


def label_path(image: Path) -> Path:
    """The text file that belongs to an image, whether it exists or not."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


def read_labels(path: Path, size: tuple[int, int], names: list[str]) -> Labels:
    """Read one label file; a missing or empty one belongs to a background image.

    Args:
        path: Text file.
        size: Height and width of the image in pixels.
        names: Class names of the data set.

    Raises:
        UserError: A line that is no label, or whose class is out of range.
    """
    if not path.exists():
        return Labels.background()
    classes, boxes, polygons, areas = [], [], [], []
    for number, line in enumerate(_read_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            index, box, polygon = _parse(line, size, names)
        except ValueError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        width, height = box[2] - box[0], box[3] - box[1]
        if width <= 0 or height <= 0:
            continue
        classes.append(index)
        boxes.append(box)
        polygons.append([] if polygon is None else [polygon])
        areas.append(float(width * height) if polygon is None else polygon_area(polygon))
    if not classes:
        return Labels.background()
    return Labels(
        classes=np.array(classes, np.int64),
        boxes=np.array(boxes, np.float32),
        polygons=tuple(polygons),
        crowd=np.zeros(len(classes), np.bool_),
        areas=np.array(areas, np.float64),
    )


def _parse(
    line: str, size: tuple[int, int], names: list[str]
) -> tuple[int, np.ndarray, Polygon | None]:
    """Class, box [4] and polygon in pixels of one line; ValueError says what is wrong with it."""
    fields = line.split()
    try:
        numbers = np.array([float(field) for field in fields])
    except ValueError:
        raise ValueError(f"{line.strip()!r} is not made of numbers") from None
    if len(numbers) < 5 or len(numbers) % 2 == 0:
        raise ValueError(
            f"{len(numbers)} numbers; a label is `class cx cy w h` or `class x1 y1 x2 y2 x3 y3 ...`"
        )
    if not np.isfinite(numbers).all() or numbers[0] != int(numbers[0]):
        raise ValueError(f"{line.strip()!r} is no label: the class must be a whole number")
    index, values = int(numbers[0]), numbers[1:]
    if not 0 <= index < len(names):
        raise ValueError(
            f"class {index}, but the data set names {len(names)} classes (0 to {len(names) - 1}): "
            "correct the label or the names"
        )
    if values.min() < -SLACK or values.max() > 1 + SLACK:
        raise ValueError("coordinates must be fractions of the image's width and height, 0 to 1")
    height, width = size
    if len(values) == 4:
        cx, cy, w, h = values * (width, height, width, height)
        return index, np.array([cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2]), None
    points = values.reshape(-1, 2) * (width, height)
    box = np.concatenate([points.min(0), points.max(0)])
    return index, box, points.astype(np.float32)


def polygon_area(polygon: Polygon) -> float:
    """Area in square pixels of a polygon [k, 2] (shoelace formula)."""
    x, y = polygon.astype(np.float64).T
    return float(abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2)


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None
