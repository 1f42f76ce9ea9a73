"""Data sets in COCO form: one json with images, annotations and categories."""

import json
from collections.abc import Callable
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from yolov7.dataset.sample import Labels, Polygon
from yolov7.errors import UserError

SPLITS = ("train", "val", "test")

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """Read a COCO json and check that it is one."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no valid json ({error}): download or write it again") from None
    missing = [
        key
        for key in ("annotations", "categories", "images")
        if type(content) is not dict or type(content.get(key)) is not list
    ]
    if missing:
        raise UserError(f"{path} is no COCO json: it has no {', '.join(missing)}")
    return dict(content)


def read_categories(
    content: dict[str, Any], path: Path, names: list[str] | None
) -> tuple[list[str], list[int]]:
    """Class names and their category ids.

    Args:
        content: The json.
        path: Where it was read, for messages.
        names: The order of the classes, from a data.yaml; None: by category id.
    """

    def read(category: dict[str, Any]) -> tuple[str, int]:
        return str(category["name"]), _whole(category, "id")

    by_name = dict(_each(content["categories"], "category", path, read))
    if len(by_name) < len(content["categories"]):
        raise UserError(f"{path}: two categories have the same name: rename one")
    if names is None:
        names = sorted(by_name, key=by_name.__getitem__)
    unknown = sorted(set(by_name) ^ set(names))
    if unknown:
        raise UserError(
            f"{path}: its categories and the names of the data.yaml differ in "
            f"{', '.join(unknown[:5])}: make them the same"
        )
    return list(names), [by_name[name] for name in names]


class Listed(NamedTuple):
    """An image as the json lists it."""

    file: str
    image_id: int
    size: tuple[int, int] | None  # height, width in pixels


def read_images(content: dict[str, Any], path: Path) -> list[Listed]:
    """The images in the order of the json; `path` is where it was read, for messages."""

    def read(image: dict[str, Any]) -> Listed:
        stated = "height" in image and "width" in image
        size = (_whole(image, "height"), _whole(image, "width")) if stated else None
        return Listed(str(image["file_name"]), _whole(image, "id"), size)

    return _each(content["images"], "image", path, read)


class _Object(NamedTuple):
    image_id: int
    class_index: int
    xywh: list[float]
    polygons: list[Polygon]
    crowd: bool
    area: float


def read_annotations(
    content: dict[str, Any], path: Path, category_ids: list[int]
) -> dict[int, Labels]:
    """The labels of every image that has any, by image id.

    Args:
        content: The json.
        path: Where it was read, for messages.
        category_ids: The category id of each class.
    """
    classes = {category: index for index, category in enumerate(category_ids)}

    def read(annotation: dict[str, Any]) -> _Object:
        category = _whole(annotation, "category_id")
        if category not in classes:
            raise UserError(
                f"has category {category}, which is not among the categories: correct it"
            )
        xywh = [float(value) for value in annotation["bbox"]]
        if len(xywh) != 4 or not all(map(isfinite, xywh)):
            raise UserError(f"has the bbox {annotation['bbox']}: give x, y, width, height")
        area = annotation.get("area")
        return _Object(
            image_id=_whole(annotation, "image_id"),
            class_index=classes[category],
            xywh=xywh,
            polygons=_polygons(annotation),
            crowd=int(annotation.get("iscrowd") or 0) != 0,
            area=xywh[2] * xywh[3] if area is None else float(area),
        )

    by_image: dict[int, list[_Object]] = {}
    for item in _each(content["annotations"], "annotation", path, read):
        by_image.setdefault(item.image_id, []).append(item)
    return {image: _labels(objects) for image, objects in by_image.items()}


def _labels(objects: list[_Object]) -> Labels:
    xywh = np.array([item.xywh for item in objects], np.float64)
    return Labels(
        classes=np.array([item.class_index for item in objects], np.int64),
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).astype(np.float32),
        polygons=tuple(item.polygons for item in objects),
        crowd=np.array([item.crowd for item in objects], np.bool_),
        areas=np.array([item.area for item in objects], np.float64),
    )


def _polygons(annotation: dict[str, Any]) -> list[Polygon]:
    """The parts of an outline; a run-length mask (crowds have them) is no outline."""
    parts = annotation.get("segmentation")
    if not isinstance(parts, list):
        return []
    polygons = []
    for part in parts:
        if len(part) % 2:
            raise UserError(f"has a polygon of {len(part)} numbers: give x and y of every point")
        if len(part) >= 6:
            polygons.append(np.array(part, np.float32).reshape(-1, 2))
    return polygons


def _each(
    entries: list[dict[str, Any]], noun: str, path: Path, read: Callable[[dict[str, Any]], T]
) -> list[T]:
    """What `read` makes of the entries; whatever it stumbles over is said with their id."""
    found: list[T] = []
    for entry in entries:
        try:
            found.append(read(entry))
            continue
        except UserError as error:
            reason = str(error)
        except KeyError as error:
            reason = f"has no {error.args[0]}"
        except (TypeError, ValueError, OverflowError) as error:
            reason = f"is not as it should be: {error}"
        named = type(entry) is dict and "id" in entry
        name = f"{noun} {entry['id']}" if named else f"{noun} number {len(found) + 1}"
        raise UserError(f"{path} is no COCO json: {name} {reason}")
    return found


def _whole(entry: dict[str, Any], key: str) -> int:
    """A whole number; some tools write it as text, `"7"`, in one list and not in another."""
    value = entry[key]
    try:
        number = int(value)
        if number.bit_length() < 64 and (type(value) is not float or number == value):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise UserError(f"has the {key} {value!r}: give a whole number")


def split_word(path: Path) -> str | None:
    """The split that a file's name speaks of: `instances_val2017.json` is `val`."""
    words = [split for split in SPLITS if split in path.stem.lower()]
    return words[0] if len(words) == 1 else None


def find_json(folder: Path, split: str) -> Path | None:
    """The json of a split in a folder or in its `annotations`, None where there is none.

    Raises:
        UserError: More than one could be meant.
    """
    found = [
        path
        for place in (folder, folder / "annotations")
        for path in sorted(place.glob("*.json"))
        if split in path.stem.lower()
    ]
    instances = [path for path in found if path.stem.startswith("instances_")] or found
    if len(instances) > 1:
        listed = ", ".join(path.name for path in instances)
        raise UserError(f"{folder} has several files for {split} ({listed}): name one of them")
    return instances[0] if instances else None


def find_images(path: Path, images: list[Listed], split: str) -> Path:
    """The folder from which the file names of a COCO json start.

    Tried in this order, from the folder of the json and then from its parent: the folder itself,
    `images`, and in both of them the name of the json without `instances_`, and the split.

    Raises:
        UserError: None of them holds any of the first images.
    """
    subset = path.stem.removeprefix("instances_")
    tails = ("", subset, split, "images", f"images/{subset}", f"images/{split}")
    files = [image.file for image in images[:20]]
    places = [root / tail for root in (path.parent, path.parent.parent) for tail in tails]
    for place in places:
        if any((place / file).is_file() for file in files):
            return place
    raise UserError(
        f"{path}: its images ({files[0] if files else 'none are named'}) were found neither "
        f"beside it nor in {path.parent.parent / subset}: put them there"
    )
