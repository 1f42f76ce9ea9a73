"""Recognise the form of a data set, read one split of it, and keep what was read."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from yolov7.dataset import cache, coco, yolo
from yolov7.dataset.image_size import image_size
from yolov7.dataset.sample import Dataset, Labels, Sample
from yolov7.errors import UserError
from yolov7.progress import progress

COCO_YAML = Path(__file__).parents[1] / "assets" / "coco.yaml"
COCO_HELP = (
    "put https://images.cocodataset.org/zips/{val2017,train2017}.zip and "
    "https://images.cocodataset.org/annotations/annotations_trainval2017.zip there, unpacked, "
    "or name another folder with YOLOV7_DATASETS"
)
READERS = 8  # threads that read headers: they wait for the disk more than they work


def load_data(spec: str | Path, split: str) -> Dataset:
    """Read one split of a data set.

    Args:
        spec: A `data.yaml`, a folder with one, a COCO json, a folder of COCO jsons, or `coco`.
        split: `train`, `val`, `test`, or another key of the `data.yaml`.

    Returns:
        Its images and labels; images that cannot be read are listed in `skipped`.

    Raises:
        UserError: Nothing is there, or a label or a description is wrong.
    """
    if str(spec) == "coco":
        return _load_coco(split)
    path = Path(spec)
    if path.is_dir():
        path = _description(path, split)
    if not path.is_file():
        raise UserError(f"{path} does not exist: name a data.yaml, a COCO json or coco")
    if path.suffix.lower() == ".json":
        word = coco.split_word(path)
        if word not in (None, split):
            raise UserError(f"{path} is the {word} split, not {split}: say --split {word}")
        return _read_coco(path, split, None)
    if path.suffix.lower() in (".yaml", ".yml"):
        return _read_yaml(path, split)
    raise UserError(f"{path} is neither a data.yaml nor a COCO json")


def _load_coco(split: str) -> Dataset:
    root = Path(os.environ.get("YOLOV7_DATASETS") or "datasets") / "coco"
    if not (root / "annotations").is_dir():
        raise UserError(f"COCO is not in {root.absolute()}: {COCO_HELP}")
    return _read_yaml(COCO_YAML, split, root)


def _description(folder: Path, split: str) -> Path:
    """The file that describes a split of the data set in a folder."""
    for name in ("data.yaml", "data.yml", "dataset.yaml"):
        if (folder / name).is_file():
            return folder / name
    found = coco.find_json(folder, split)
    if found is None:
        raise UserError(f"{folder} holds neither a data.yaml nor a COCO json for {split}")
    return found


def _read_yaml(path: Path, split: str, root: Path | None = None) -> Dataset:
    """Read a split of a data.yaml; `root` overrides the folder that it names."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no valid yaml: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} is no data.yaml: it must name its splits and classes")
    root = root or _root(path, content)
    entries = content.get(split)
    if not entries:
        known = [
            key for key in content if key not in ("path", "names", "nc", "category_ids", "download")
        ]
        raise UserError(f"{path} has no split {split}: it has {', '.join(map(str, known))}")
    if not isinstance(entries, list):
        entries = [entries]
    places = [_place(root, str(entry)) for entry in entries]
    if any(place.suffix.lower() == ".json" for place in places):
        if len(places) > 1:
            raise UserError(f"{path}: {split} must be one COCO json, or images only")
        names = _names(path, content) if "names" in content else None
        return _read_coco(places[0], split, names)
    return _read_yolo(places, root, _names(path, content), f"{path.absolute()}\0{split}")


def _root(path: Path, content: dict[str, Any]) -> Path:
    """The folder from which the splits of a data.yaml start."""
    stated = Path(str(content.get("path") or "."))
    beside = path.parent / stated
    return beside if beside.is_dir() or not stated.is_dir() else stated


def _place(root: Path, entry: str) -> Path:
    """Where an entry of a data.yaml leads.

    Some tools write `../train/images` for a folder beside the data.yaml, others paths from the
    working directory; both are tried where the plain reading leads nowhere.
    """
    places = [root / entry, root / entry.removeprefix("../"), Path(entry)]
    return next((place for place in places if place.exists()), places[0])


def _names(path: Path, content: dict[str, Any]) -> list[str]:
    names = content.get("names")
    if isinstance(names, dict):
        if sorted(names) != list(range(len(names))):
            raise UserError(f"{path}: the keys of names must be 0 to {len(names) - 1}")
        names = [names[index] for index in range(len(names))]
    if not isinstance(names, list) or not names:
        raise UserError(f"{path} must give the names of the classes: names: [person, car]")
    if content.get("nc", len(names)) != len(names):
        raise UserError(f"{path}: nc is {content['nc']}, but it has {len(names)} names")
    return [str(name) for name in names]


def _read_yolo(places: list[Path], root: Path, names: list[str], place: str) -> Dataset:
    images = [image for entry in places for image in yolo.list_images(entry, root)]
    if not images:
        raise UserError(f"{places[0]} holds no images: correct the path in the data.yaml")
    labels = [yolo.label_path(image) for image in images]
    files = [*images, *labels]
    found = cache.load(place, names, files)
    if found is not None:
        return found
    ids = _image_ids(images)
    rows = [_Row(image, number) for image, number in zip(images, ids, strict=True)]
    dataset = _collect(
        rows,
        lambda position, size: yolo.read_labels(labels[position], size, names),
        names,
        _category_ids(names),
    )
    cache.store(place, names, files, dataset)
    return dataset


def _read_coco(path: Path, split: str, stated: list[str] | None) -> Dataset:
    place = f"{path.absolute()}\0{split}"
    found = cache.load(place, stated, None)
    if found is not None:
        return found
    content = coco.read_json(path)
    names, category_ids = coco.read_categories(content, path, stated)
    images = coco.read_images(content, path)
    root = coco.find_images(path, images, split)
    rows = [_Row(root / image.file, image.image_id, image.size) for image in images]
    labels = coco.read_annotations(content, path, category_ids)
    background = Labels.background()
    dataset = _collect(
        rows,
        lambda position, _: labels.get(rows[position].image_id, background),
        names,
        category_ids,
    )
    cache.store(place, stated, [path, *(row.path for row in rows)], dataset)
    return dataset


@dataclass(frozen=True)
class _Row:
    """An image that a data set lists, with the height and width that it states, if it does."""

    path: Path
    image_id: int
    stated: tuple[int, int] | None = None


def _collect(
    rows: list[_Row],
    labels: Callable[[int, tuple[int, int]], Labels],
    names: list[str],
    category_ids: list[int],
) -> Dataset:
    """Measure every image and join it with its labels, `labels(position, (height, width))`."""
    dataset = Dataset([], names, category_ids)
    with ThreadPoolExecutor(READERS) as pool:
        sizes = pool.map(_measure, rows)
        shown = progress(sizes, "reading images", len(rows))
        for position, (row, size) in enumerate(zip(rows, shown, strict=True)):
            if isinstance(size, str):
                dataset.skipped.append(size)
                continue
            dataset.samples.append(
                Sample(
                    path=row.path,
                    height=size[0],
                    width=size[1],
                    image_id=row.image_id,
                    labels=labels(position, size),
                )
            )
    if not dataset.samples:
        raise UserError(f"none of {len(rows)} images can be read: {dataset.skipped[0]}")
    return dataset


def _measure(row: _Row) -> tuple[int, int] | str:
    """Height and width of an image, or the line that says why it is skipped."""
    if not row.path.is_file():
        return f"{row.path}: does not exist"
    try:
        size = image_size(row.path)
    except UserError as error:
        return str(error)
    if row.stated not in (None, size):
        return (
            f"{row.path}: is {size[1]}x{size[0]}, but its annotations are made for "
            f"{row.stated[1]}x{row.stated[0]}"
        )
    return size


def _image_ids(images: list[Path]) -> list[int]:
    """The numbers that the file names are, else positions."""
    stems = [image.stem for image in images]
    if all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return [int(stem) for stem in stems]
    return list(range(len(images)))


def _category_ids(names: list[str]) -> list[int]:
    """COCO's own ids for COCO's 80 names, else the classes themselves."""
    packaged = yaml.safe_load(COCO_YAML.read_text(encoding="utf-8"))
    if names == packaged["names"]:
        return list(packaged["category_ids"])
    return list(range(len(names)))
