"""Data sets in COCO form: one json with images, annotations and categories."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from yolov7.dataset.description import native
from yolov7.dataset.sample import Labels, Polygon, Problem
from yolov7.errors import UserError
from yolov7.text import printable

# How the names of files and folders call the splits.
SPLITS = {
    "train": frozenset({"train", "training"}),
    "val": frozenset({"val", "valid", "validation"}),
    "test": frozenset({"test", "testing"}),
}

T = TypeVar("T")


def read_json(path: Path) -> dict[str, Any]:
    """Read a COCO json and check that it is one."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except MemoryError:
        raise UserError(f"{path} is too large for the memory of this machine") from None
    except (ValueError, RecursionError) as error:
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

    Roboflow adds a category that only stands above the others: one that nothing is annotated with,
    and whose name is the supercategory of another, is no class.

    Args:
        content: The json.
        path: Where it was read, for messages.
        names: The order of the classes, from a data.yaml; None: by category id.
    """

    def read(category: dict[str, Any]) -> tuple[str, int, str]:
        above = str(category.get("supercategory"))
        return printable(category["name"]), _whole(category, "id"), above

    rows = _each(content["categories"], "category", path, read)
    used = {str(a.get("category_id")) for a in content["annotations"] if isinstance(a, dict)}
    above = {above for name, _, above in rows if above != name}
    rows = [row for row in rows if str(row[1]) in used or row[0] not in above]
    for noun, values in (("name", [row[0] for row in rows]), ("id", [row[1] for row in rows])):
        if len(set(values)) < len(values):
            raise UserError(f"{path}: two categories have the same {noun}: correct one")
    by_name = {name: number for name, number, _ in rows}
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

    file: Path
    image_id: int
    size: tuple[int, int] | None  # height, width in pixels


def read_images(content: dict[str, Any], path: Path) -> list[Listed]:
    """The images in the order of the json; `path` is where it was read, for messages."""

    def read(image: dict[str, Any]) -> Listed:
        stated = bool(image.get("height")) and bool(image.get("width"))
        size = (_whole(image, "height"), _whole(image, "width")) if stated else None
        return Listed(native(str(image["file_name"])), _whole(image, "id"), size)

    found = _each(content["images"], "image", path, read)
    numbers = Counter(image.image_id for image in found)
    if twice := [number for number, count in numbers.items() if count > 1]:
        raise UserError(
            f"{path}: {len(twice)} ids belong to several images, the first is {twice[0]}: "
            "give every image its own"
        )
    return found


class _Object(NamedTuple):
    image_id: int
    class_index: int
    xywh: list[float]
    polygons: list[Polygon]
    crowd: bool
    area: float


def read_annotations(
    content: dict[str, Any], path: Path, category_ids: list[int]
) -> tuple[dict[int, Labels], list[Problem]]:
    """The labels of every image that has any, by image id, and what is left out.

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

    problems: list[Problem] = []
    by_image: dict[int, dict[tuple[Any, ...], _Object]] = {}
    for item in _each(content["annotations"], "annotation", path, read, problems):
        objects = by_image.setdefault(item.image_id, {})
        what = (item.class_index, *item.xywh, item.crowd)
        if what in objects:
            place = f"{path}: image {item.image_id}"
            problems.append(Problem("duplicate label", place, "two annotations are the same"))
        elif item.xywh[2] < 0 or item.xywh[3] < 0:
            place = f"{path}: image {item.image_id}"
            problems.append(Problem("wrong label", place, f"a bbox of size {item.xywh[2:]}"))
        else:
            objects[what] = item
    labels = {image: _labels(list(objects.values())) for image, objects in by_image.items()}
    return labels, problems


def _labels(objects: list[_Object]) -> Labels:
    xywh = np.array([item.xywh for item in objects], np.float64).reshape(-1, 4)
    return Labels(
        classes=np.array([item.class_index for item in objects], np.int64),
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).astype(np.float32),
        polygons=tuple(item.polygons for item in objects),
        crowd=np.array([item.crowd for item in objects], np.bool_),
        areas=np.array([item.area for item in objects], np.float64),
    )


def _polygons(annotation: dict[str, Any]) -> list[Polygon]:
    """The parts of an outline; a run-length mask (crowds have them) is none, nor what is no list.

    The box stands beside it, so an outline that cannot be read costs no label.
    """
    parts = annotation.get("segmentation")
    if not isinstance(parts, list):
        return []
    polygons = []
    for part in parts:
        if isinstance(part, list) and len(part) >= 6 and len(part) % 2 == 0:
            with suppress(TypeError, ValueError):
                points = np.array(part, np.float32)
                if points.ndim == 1 and np.isfinite(points).all():
                    polygons.append(points.reshape(-1, 2))
    return polygons


def _each(
    entries: list[dict[str, Any]],
    noun: str,
    path: Path,
    read: Callable[[dict[str, Any]], T],
    problems: list[Problem] | None = None,
) -> list[T]:
    """What `read` makes of the entries; whatever it stumbles over is said with their id.

    It is an error where there is no list of problems.
    """
    found: list[T] = []
    for number, entry in enumerate(entries, 1):
        try:
            if type(entry) is not dict:
                raise UserError("is no object with fields")
            found.append(read(entry))
            continue
        except UserError as error:
            reason = str(error)
        except KeyError as error:
            reason = f"has no {error.args[0]}"
        except (TypeError, ValueError, OverflowError) as error:
            reason = f"is not as it should be: {error}"
        named = type(entry) is dict and "id" in entry
        name = f"{noun} {entry['id']}" if named else f"{noun} number {number}"
        if problems is None:
            raise UserError(f"{path} is no COCO json: {name} {reason}")
        problems.append(Problem("wrong label", str(path), f"{name} {reason}"))
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
    """The split that the name of a file, else that of its folder, speaks of.

    `instances_val2017.json` and `valid/_annotations.coco.json` are `val`.
    """
    words = set(re.findall(r"[a-z]+", path.stem.lower()))
    folder = {path.absolute().parent.name.lower()}
    for said in (words, folder):
        found = [split for split, spellings in SPLITS.items() if said & spellings]
        if len(found) == 1:
            return found[0]
    return None


def find_json(folder: Path, split: str) -> Path | None:
    """The json of a split in a folder, in its `annotations`, or in a folder of the split's name.

    Raises:
        UserError: More than one could be meant.
    """
    spellings = SPLITS.get(split, frozenset({split}))
    places = [folder, folder / "annotations", *(folder / name for name in sorted(spellings))]
    listed = [path for place in places for path in sorted(place.glob("*.json"))]
    listed = [path for path in listed if not path.name.startswith("._")]
    if split in SPLITS:
        found = [path for path in listed if split_word(path) == split]
    else:
        found = [path for path in listed if split in path.stem.lower()]
    instances = [path for path in found if path.stem.startswith("instances_")] or found
    if len(instances) > 1:
        names = ", ".join(path.name for path in instances)
        raise UserError(f"{folder} has several files for {split} ({names}): name one of them")
    return instances[0] if instances else None


def find_sibling(path: Path, split: str) -> Path | None:
    """The json of another split that lies beside one, or in the folder beside its folder."""
    found = (find_json(folder, split) for folder in (path.parent, path.parent.parent))
    return next((other for other in found if other is not None), None)


def find_only_json(folder: Path) -> Path | None:
    """The one json of a folder, or of its `annotations`, that speaks of no split."""
    places = (folder, folder / "annotations")
    listed = [path for place in places for path in place.glob("*.json")]
    found = [p for p in listed if split_word(p) is None and not p.name.startswith("._")]
    return found[0] if len(found) == 1 else None


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
        if any(os.path.isfile(place / file) for file in files):
            return place
    raise UserError(
        f"{path}: its images ({files[0] if files else 'none are named'}) were found neither "
        f"beside it nor in {path.parent.parent / subset}: put them there"
    )
