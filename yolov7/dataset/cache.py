"""The label cache: a parsed split, kept in the user's cache folder and never stale.

An entry is used only while its key holds: the path, size and modification time of every image
and label file as they were before they were read, the class names, and the version of this format.
Folders of data are never written.
"""

import hashlib
import json
import os
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from yolov7.atomic import atomic
from yolov7.cache import cache_folder
from yolov7.dataset.sample import Dataset, Labels, Problem, Sample
from yolov7.errors import UserError

VERSION = 4  # raise it whenever the same files would be read differently


class Key(NamedTuple):
    """What a split is made from, and in which state that was before it was read.

    Attributes:
        place: What the split was asked by: data set and split; one entry is kept for each.
        digest: Of the files' paths, sizes and times of modification, and of what was stated.
        files: Every file that the split is read from.
    """

    place: str
    digest: str
    files: list[Path]


def key(place: str, stated: object, files: list[Path]) -> Key:
    """The key of a split as its files are now; a missing file counts as missing.

    Args:
        place: What the split was asked by.
        stated: What else decides what is read, such as class names; JSON values.
        files: Every file that the split is read from.
    """
    digest = hashlib.sha256(json.dumps([VERSION, stated]).encode(errors="surrogatepass"))
    for file in files:
        try:
            status = os.stat(file)
            state = f"{status.st_size} {status.st_mtime_ns}"
        except (OSError, ValueError):
            state = "missing"
        digest.update(f"{file}\0{state}\0".encode(errors="surrogatepass"))
    return Key(place, digest.hexdigest(), files)


def load(wanted: Key) -> Dataset | None:
    """The cached split, None where there is none, it is stale or damaged."""
    try:
        with np.load(_entry(wanted.place), allow_pickle=False) as arrays:
            if arrays["key"].tobytes().decode() != wanted.digest:
                return None
            return _unpack({name: arrays[name] for name in arrays.files})
    except (OSError, ValueError, KeyError, IndexError, EOFError, zipfile.BadZipFile):
        return None


def kept_files(place: str) -> list[Path]:
    """The files of the entry that is kept for a place, whose first says which the others are."""
    try:
        with np.load(_entry(place), allow_pickle=False) as arrays:
            return [Path(file) for file in _text(arrays["files"])]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return []


def store(read: Key, dataset: Dataset) -> None:
    """Keep a split, in one step; a folder that cannot be written is not an error.

    Args:
        read: Its key, made before the files were read: what has changed since is read again.
        dataset: The split.
    """
    arrays = _pack(dataset)
    arrays["key"] = _bytes(read.digest)
    arrays["files"] = _bytes(json.dumps([str(file) for file in read.files]))
    with suppress(UserError), atomic(_entry(read.place), durable=False) as temporary:
        np.savez(temporary, allow_pickle=False, **arrays)


def _entry(place: str) -> Path:
    name = hashlib.sha256(place.encode(errors="surrogatepass")).hexdigest()[:32]
    return cache_folder("labels") / f"{name}.npz"


def _bytes(text: str) -> NDArray[np.uint8]:
    return np.frombuffer(text.encode(errors="surrogatepass"), np.uint8)


def _text(array: NDArray[np.uint8]) -> Any:
    return json.loads(array.tobytes().decode(errors="surrogatepass"))


def _concat(arrays: list[Any], dtype: Any, width: int = 0) -> NDArray[Any]:
    empty = np.zeros((0, width) if width else 0, dtype)
    return np.concatenate([empty, *arrays])


def _pack(dataset: Dataset) -> dict[str, NDArray[Any]]:
    """The split as a few flat arrays: values of all samples after one another, and counts."""
    samples = dataset.samples
    outlines = [outline for sample in samples for outline in sample.labels.polygons]
    parts = [part for outline in outlines for part in outline]
    text = {
        "names": dataset.names,
        "skipped": dataset.skipped,
        "problems": dataset.problems,
        "label_files": dataset.label_files,
        "paths": [str(sample.path) for sample in samples],
    }
    return {
        "text": _bytes(json.dumps(text)),
        "category_ids": np.array(dataset.category_ids, np.int64),
        "images": np.array(
            [(s.height, s.width, s.image_id, len(s.labels.classes)) for s in samples], np.int64
        ).reshape(-1, 4),
        "classes": _concat([s.labels.classes for s in samples], np.int64),
        "boxes": _concat([s.labels.boxes for s in samples], np.float32, 4),
        "crowd": _concat([s.labels.crowd for s in samples], np.bool_),
        "areas": _concat([s.labels.areas for s in samples], np.float64),
        "outlines": np.array([len(outline) for outline in outlines], np.int64),
        "parts": np.array([len(part) for part in parts], np.int64),
        "points": _concat(parts, np.float32, 2),
    }


def _unpack(arrays: dict[str, NDArray[Any]]) -> Dataset:
    text = _text(arrays["text"])
    images = arrays["images"]
    ends = np.cumsum(images[:, 3])[:-1]
    split = {name: np.split(arrays[name], ends) for name in ("classes", "boxes", "crowd", "areas")}
    parts = np.split(arrays["points"], np.cumsum(arrays["parts"])[:-1])
    last = np.cumsum(arrays["outlines"])
    polygons = [
        parts[end - count : end] for end, count in zip(last, arrays["outlines"], strict=True)
    ]
    samples, first = [], 0
    for position, (height, width, image_id, count) in enumerate(images.tolist()):
        samples.append(
            Sample(
                path=Path(text["paths"][position]),
                height=height,
                width=width,
                image_id=image_id,
                labels=Labels(
                    polygons=tuple(polygons[first : first + count]),
                    **{name: values[position] for name, values in split.items()},
                ),
            )
        )
        first += count
    skipped, problems = ([Problem(*row) for row in text[name]] for name in ("skipped", "problems"))
    ids = arrays["category_ids"].tolist()
    return Dataset(samples, text["names"], ids, skipped, problems, label_files=text["label_files"])
