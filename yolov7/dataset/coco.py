"""Data sets in COCO form: one json with images, annotations and categories."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from yolov7.dataset.sample import Labels, Polygon
from yolov7.errors import UserError

SPLITS = ("train", "val", "test")


def read_json(path: Path) -> dict[str, Any]:
    """Read a COCO json and check that it is one."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is no valid json ({error}): download or write it again") from None
    missing = {"images", "annotations", "categories"} - set(
        content if type(content) is dict else ()
    )
    if missing:
        raise UserError(f"{path} is no COCO json: it has no {', '.join(sorted(missing))}")
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
    by_name = {str(c["name"]): int(c["id"]) for c in content["categories"]}
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
    by_image: dict[int, list[dict[str, Any]]] = {}
    for annotation in content["annotations"]:
        if annotation["category_id"] not in classes:
            raise UserError(
                f"{path}: annotation {annotation.get('id')} has category "
                f"{annotation['category_id']}, which is not among the categories: correct it"
            )
        by_image.setdefault(annotation["image_id"], []).append(annotation)
    return {image: _labels(found, classes) for image, found in by_image.items()}


def _labels(annotations: list[dict[str, Any]], classes: dict[int, int]) -> Labels:
    xywh = np.array([a["bbox"] for a in annotations], np.float64).reshape(-1, 4)
    sizes = xywh[:, 2] * xywh[:, 3]
    return Labels(
        classes=np.array([classes[a["category_id"]] for a in annotations], np.int64),
        boxes=np.concatenate([xywh[:, :2], xywh[:, :2] + xywh[:, 2:]], 1).astype(np.float32),
        polygons=tuple(_polygons(a) for a in annotations),
        crowd=np.array([bool(a.get("iscrowd", 0)) for a in annotations], np.bool_),
        areas=np.array(
            [a.get("area", size) for a, size in zip(annotations, sizes, strict=True)], np.float64
        ),
    )


def _polygons(annotation: dict[str, Any]) -> list[Polygon]:
    """The parts of an outline; a run-length mask (crowds have them) is no outline."""
    parts = annotation.get("segmentation")
    if not isinstance(parts, list):
        return []
    return [np.array(p, np.float32).reshape(-1, 2) for p in parts if len(p) >= 6]


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


def find_images(path: Path, content: dict[str, Any], split: str) -> Path:
    """The folder from which the file names of a COCO json start.

    Tried in this order, from the folder of the json and then from its parent: the folder itself,
    `images`, and in both of them the name of the json without `instances_`, and the split.

    Raises:
        UserError: None of them holds any of the first images.
    """
    subset = path.stem.removeprefix("instances_")
    tails = ("", subset, split, "images", f"images/{subset}", f"images/{split}")
    files = [str(image["file_name"]) for image in content["images"][:20]]
    places = [root / tail for root in (path.parent, path.parent.parent) for tail in tails]
    for place in places:
        if any((place / file).is_file() for file in files):
            return place
    raise UserError(
        f"{path}: its images ({files[0] if files else 'none are named'}) were found neither "
        f"beside it nor in {path.parent.parent / subset}: put them there"
    )
