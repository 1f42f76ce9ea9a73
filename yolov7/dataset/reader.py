"""Recognise the form of a data set, read one split of it, and keep what was read."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from yolov7.dataset import cache, coco, yolo
from yolov7.dataset.description import Description, read_description, read_yaml
from yolov7.dataset.sample import Dataset, Labels, Problem, Sample
from yolov7.errors import UserError
from yolov7.images import image_size
from yolov7.progress import progress

COCO_YAML = Path(__file__).parents[1] / "assets" / "coco.yaml"
COCO_HELP = (
    "put https://images.cocodataset.org/zips/{val2017,train2017}.zip and "
    "https://images.cocodataset.org/annotations/annotations_trainval2017.zip there, unpacked, "
    "or name another folder with YOLOV7_DATASETS"
)
TOLERATED = 0.1  # share of labels that may be wrong: beyond it they are another data set's
READERS = 8  # threads that read headers: they wait for the disk more than they work


def load_data(spec: str | Path, split: str) -> Dataset:
    """Read one split of a data set.

    Args:
        spec: A `data.yaml`, a folder with one, a COCO json, a folder of COCO jsons, or `coco`.
        split: `train`, `val`, `test`, or another key of the `data.yaml`.

    Returns:
        Its images and labels. Images that cannot be read are listed in `skipped`, labels that are
        wrong or come twice in `problems`.

    Raises:
        UserError: Nothing is there, a description is wrong, or more than a tenth of the labels.
    """
    dataset = read_split(spec, split)
    wrong = [problem for problem in dataset.problems if problem.kind == "wrong label"]
    labels = len(wrong) + sum(len(sample.labels.classes) for sample in dataset.samples)
    if len(wrong) > TOLERATED * labels:
        raise UserError(
            f"{wrong[0]} ({len(wrong)} of {labels} labels are wrong; yolov7 check lists them all)"
        )
    return dataset


def read_split(spec: str | Path, split: str) -> Dataset:
    """`load_data` for whatever number of wrong labels."""
    path = _find(spec, split)
    if path == COCO_YAML:
        root = Path(os.environ.get("YOLOV7_DATASETS") or "datasets") / "coco"
        if not (root / "annotations").is_dir():
            raise UserError(f"COCO is not in {root.absolute()}: {COCO_HELP}")
        return _read_described(read_description(path, root), split)
    if path.suffix.lower() == ".json":
        return _read_coco(path, split, None)
    return _read_described(read_description(path), split)


def known_splits(spec: str | Path) -> list[str]:
    """The splits that a data set has; one json that speaks of none is one split.

    Raises:
        UserError: There is none.
    """
    path = COCO_YAML if str(spec) == "coco" else Path(spec)
    if os.path.isdir(path):
        path = _data_yaml(path) or path
    if path.suffix.lower() in (".yaml", ".yml") and os.path.isfile(path):
        splits = [split for split, entries in read_description(path).splits.items() if entries]
        if not splits:
            raise UserError(f"{path} has no split: say where the images lie, as in train: images")
        return splits
    found: dict[Path, str] = {}  # one name for each file
    reason = UserError(f"{spec} has no split")
    for split in coco.SPLITS:
        try:
            found.setdefault(_find(spec, split), split)
        except UserError as error:
            reason = error
    if not found:
        raise reason
    return list(found.values())


def _find(spec: str | Path, split: str) -> Path:
    """The data.yaml or COCO json that a split is described by."""
    if str(spec) == "coco":
        return COCO_YAML
    path = Path(spec)
    if os.path.isdir(path):
        path = _description(path, split)
    if not os.path.isfile(path):
        raise UserError(f"{path} does not exist: name a data.yaml, a COCO json or coco")
    if path.suffix.lower() == ".json":
        word = coco.split_word(path)
        if word in (None, split):
            return path
        if sibling := coco.find_sibling(path, split):
            return sibling
        raise UserError(f"{path} is the {word} split, not {split}: say --split {word}")
    if path.suffix.lower() not in (".yaml", ".yml"):
        raise UserError(f"{path} is neither a data.yaml nor a COCO json")
    return path


def _description(folder: Path, split: str) -> Path:
    """The file that describes a split of the data set in a folder."""
    found = _data_yaml(folder) or coco.find_json(folder, split) or coco.find_only_json(folder)
    if found is None:
        raise UserError(f"{folder} holds neither a data.yaml nor a COCO json for {split}")
    return found


def _data_yaml(folder: Path) -> Path | None:
    places = (folder / name for name in ("data.yaml", "data.yml", "dataset.yaml"))
    return next((place for place in places if os.path.isfile(place)), None)


def _read_described(described: Description, split: str) -> Dataset:
    places = described.places(split)
    if any(place.suffix.lower() == ".json" for place in places):
        if len(places) > 1:
            raise UserError(f"{described.path}: {split} must be one COCO json, or images only")
        return _read_coco(places[0], split, described.names)
    return _read_yolo(places, described, f"{described.path.absolute()}\0{split}")


def _read_yolo(places: list[Path], described: Description, place: str) -> Dataset:
    names = described.class_names()
    listed = [image for entry in places for image in yolo.list_images(entry, described.root)]
    images = list(dict.fromkeys(listed))
    if not images:
        raise UserError(f"{places[0]} holds no images: correct the path in {described.path.name}")
    labels = yolo.label_paths(images)
    key = cache.key(place, [names, described.keypoints], [*images, *labels])
    if (found := cache.load(key)) is not None:
        return found
    ids = _image_ids(images)
    rows = [_Row(image, number) for image, number in zip(images, ids, strict=True)]
    problems: list[Problem] = []
    if len(images) < len(listed):
        text = f"{len(listed) - len(images)} images are listed more than once"
        problems.append(Problem("duplicate image", str(places[0]), text))

    def read(position: int, size: tuple[int, int]) -> Labels:
        found, wrong = yolo.read_labels(labels[position], size, len(names), described.keypoints)
        problems.extend(wrong)
        return found

    empty = Dataset([], names, _category_ids(names), problems=problems, label_files=True)
    dataset = _collect(rows, read, empty)
    cache.store(key, dataset)
    return dataset


def _read_coco(path: Path, split: str, stated: list[str] | None) -> Dataset:
    place = f"{path.absolute()}\0{split}"
    kept = cache.kept_files(place)
    if kept[:1] == [path]:  # which says by itself what the others are
        found = cache.load(cache.key(place, stated, kept))
        if found is not None:
            return found
    before = cache.key(place, stated, [path])
    content = coco.read_json(path)
    names, category_ids = coco.read_categories(content, path, stated)
    images = coco.read_images(content, path)
    root = coco.find_images(path, images, split)
    rows = [_Row(root / image.file, image.image_id, image.size) for image in images]
    key = cache.key(place, stated, [path, *(row.path for row in rows)])
    labels, problems = coco.read_annotations(content, path, category_ids)
    for image in sorted(labels.keys() - {row.image_id for row in rows}):
        text = f"{len(labels[image].classes)} annotations of image {image}, which is not listed"
        problems.append(Problem("label without image", str(path), text))
    background = Labels.background()
    dataset = _collect(
        rows,
        lambda position, _: labels.get(rows[position].image_id, background),
        Dataset([], names, category_ids, problems=problems),
    )
    if before == cache.key(place, stated, [path]):  # else the json has changed meanwhile
        cache.store(key, dataset)
    return dataset


@dataclass(frozen=True)
class _Row:
    """An image that a data set lists, with the height and width that it states, if it does."""

    path: Path
    image_id: int
    stated: tuple[int, int] | None = None


def _collect(
    rows: list[_Row], labels: Callable[[int, tuple[int, int]], Labels], dataset: Dataset
) -> Dataset:
    """Measure every image and join it with its labels, `labels(position, (height, width))`."""
    with ThreadPoolExecutor(READERS) as pool:
        sizes = pool.map(_measure, rows)
        shown = progress(sizes, "reading images", len(rows))
        for position, (row, size) in enumerate(zip(rows, shown, strict=True)):
            if isinstance(size, Problem):
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


def _measure(row: _Row) -> tuple[int, int] | Problem:
    """Height and width of an image, or why it is skipped."""
    try:
        size = image_size(row.path)
    except UserError as error:
        return Problem.of("unusable image", row.path, error)
    if row.stated not in (None, size):
        text = (
            f"is {size[1]}x{size[0]}, but its annotations are made for "
            f"{row.stated[1]}x{row.stated[0]}"
        )
        return Problem("unusable image", str(row.path), text)
    return size


def _image_ids(images: list[Path]) -> list[int]:
    """The numbers that the file names are, else positions."""
    stems = [image.stem for image in images]
    if all(stem.isdecimal() for stem in stems) and len({int(stem) for stem in stems}) == len(stems):
        return [int(stem) for stem in stems]
    return list(range(len(images)))


def _category_ids(names: list[str]) -> list[int]:
    """COCO's own ids for COCO's 80 names, else the classes themselves."""
    packaged = read_yaml(COCO_YAML)
    if names == packaged["names"]:
        return [int(number) for number in packaged["category_ids"]]
    return list(range(len(names)))
