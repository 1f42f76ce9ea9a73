"""Training images: what is read, augmentation seeded per sample.

Whatever an item of an epoch shows follows from (seed, epoch, position) alone, not from workers,
ranks or what was loaded before: runs are reproducible and resume exactly.
"""

import hashlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset

from yolov7.dataset import Dataset, load_splits
from yolov7.dataset.check import NOTES, Report, find_problems
from yolov7.errors import UserError
from yolov7.text import counted
from yolov7.train.augment import Augmenter
from yolov7.train.config import Augmentation
from yolov7.train.images import CacheKind, ImageStore
from yolov7.train.options import Train
from yolov7.train.sampler import Key
from yolov7.train.scene import Scene

Augment = Callable[[Scene, Generator], Scene]
ALL_NAMED = "yolov7 check names all, and decodes the images"
STRETCH = (0.5, 1.5)  # of a batch, in multi-scale training


def open_data(options: Train, given: tuple[Dataset, Dataset] | None) -> tuple[Dataset, Dataset]:
    """What to train and to evaluate on.

    Args:
        options: the data set, its splits, and what is taken of them.
        given: the splits, instead of those of the options.

    Raises:
        UserError: a split is missing, there is no box to train on, or the classes differ.
    """
    train, val = given or read_splits(options)
    train = part_of(train, options.fraction, options.seed)
    if options.single_class:
        train, val = as_one_class(train), as_one_class(val)
    if not sum(int((~sample.labels.crowd).sum()) for sample in train.samples):
        raise UserError(
            f"the {len(train.samples)} images to train on have not a single box, the first is "
            f"{train.samples[0].path}: check where the labels lie"
        )
    if train.names != val.names:
        raise UserError(
            f"trained on are the classes {train.names}, evaluated {val.names}: make them alike"
        )
    return train, val


def read_splits(options: Train) -> tuple[Dataset, Dataset]:
    """The splits that the options name, as they are read.

    Raises:
        UserError: one is missing or empty, or they share images.
    """
    if not options.data:
        raise UserError("nothing to train on: give --data, such as a data.yaml or a COCO json")
    try:
        return load_splits(
            options.data,
            options.split,
            options.val_split,
            val_fraction=options.val_fraction,
            seed=options.seed,
        )
    except UserError as error:
        if options.resume is None:
            raise
        raise UserError(f"{error}; if the data has moved, name it with --data") from None


def what_is_wrong(train: Dataset, val: Dataset, *, strict: bool) -> list[str]:
    """Lines about what is left out of the data and what else is wrong in it, kind by kind.

    Images are not decoded for it: `yolov7 check` does that.

    Raises:
        UserError: that is asked for, and there is a fault.
    """
    splits = {"the images to train on": train, "those to evaluate on": val}
    report = Report(splits, find_problems(splits, decode=False))
    out = {*train.skipped, *train.problems, *val.skipped, *val.problems}
    lines = []
    for kind, found in report.by_kind().items():
        what = "left out" if found[0] in out else "note" if kind in NOTES else "fault"
        lines.append(f"{what}: {counted(len(found), kind)}, such as {found[0]}")
    if strict and report.faults:
        wrong = "; ".join(line for line in lines if not line.startswith("note"))
        raise UserError(f"--strict: {wrong}; {ALL_NAMED}")
    return [*lines, ALL_NAMED] if lines else []


def match_classes(train: Dataset, val: Dataset, names: list[str]) -> tuple[Dataset, Dataset]:
    """The splits with their classes in the order of a model's, where these are the same names."""
    return train.matched(names), val.matched(names)


def part_of(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """A share of the images, at least one, in their order."""
    count = max(1, round(fraction * len(dataset.samples)))
    if count == len(dataset.samples):
        return dataset
    kept = np.random.default_rng(seed).permutation(len(dataset.samples))[:count]
    return replace(dataset, samples=[dataset.samples[i] for i in np.sort(kept)])


def as_one_class(dataset: Dataset) -> Dataset:
    """The same boxes, all of the class "object"."""
    samples = [
        replace(s, labels=replace(s.labels, classes=np.zeros_like(s.labels.classes)))
        for s in dataset.samples
    ]
    return replace(dataset, samples=samples, names=["object"], category_ids=[0])


def fingerprint(dataset: Dataset) -> str:
    """A digest of the images' names and sizes and of their labels, wherever they lie."""
    digest = hashlib.sha256(repr(dataset.names).encode(errors="surrogateescape"))
    for sample in dataset.samples:
        about = sample.path.name, sample.height, sample.width
        digest.update(repr(about).encode(errors="surrogateescape"))
        digest.update(sample.labels.classes.tobytes() + sample.labels.boxes.tobytes())
    return digest.hexdigest()


class Item(NamedTuple):
    """A training image.

    Args:
        image: `[3, H, W]` uint8, RGB.
        labels: `[n, 5]` class, centre x, centre y, width, height, the last four as fractions.
        notes: what is to be said about the images that it was to be made of.
    """

    image: Tensor
    labels: Tensor
    notes: tuple[str, ...] = ()


class TrainingData(TorchDataset[Item]):
    """Augmented training images.

    Args:
        dataset: labelled images.
        size: side of the images in pixels.
        augmentation: what happens to them.
        augment: what else happens to them, after that; may be pickled to other processes.
        seed: of everything random.
        cache: see `ImageStore`.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        augmentation: Augmentation,
        *,
        augment: Augment | None = None,
        seed: int = 0,
        cache: CacheKind = "none",
    ) -> None:
        self.seed = seed
        self.store = ImageStore(dataset.samples, size, cache)
        outlined = [i for i, s in enumerate(dataset.samples) if any(s.labels.polygons)]
        count = len(dataset.samples)
        self.augmenter = Augmenter(augmentation, size, self.store, count, outlined)
        self.augment = augment

    def __getitem__(self, key: Key) -> Item:
        """The training image of a key.

        Raises:
            ValueError: `augment` gives an image of another size or kind, or another number of
                classes than of boxes.
            UserError: no image can be read, or one that can cannot be augmented.
        """
        rng = np.random.default_rng((self.seed, key.epoch, key.position))
        try:
            scene = self.augmenter(key.image, key.shape, rng, key.others, mosaic=key.mosaic)
        except UserError:
            raise
        except Exception as error:  # the line that a worker's traceback would bury
            path = self.store.samples[key.image].path
            raise UserError(f"{path}: {type(error).__name__} {error}") from error
        if self.augment is not None:
            scene = augmented(scene, self.augment, rng)
        return Item(*to_tensors(scene), self.store.take_notes())


def augmented(scene: Scene, augment: Augment, rng: Generator) -> Scene:
    """What a user's function makes of a scene, checked.

    Raises:
        ValueError: it is no scene of that size.
    """
    result = augment(scene, rng)
    image, boxes = np.asarray(result.image), np.asarray(result.boxes, np.float32).reshape(-1, 4)
    if image.shape != scene.image.shape or image.dtype != np.uint8:
        raise ValueError(
            f"augment made {image.dtype} {image.shape} of uint8 {scene.image.shape}: keep the size"
        )
    if len(result.classes) != len(boxes):
        raise ValueError(f"augment gave {len(boxes)} boxes, {len(result.classes)} classes")
    return Scene(image, np.asarray(result.classes), boxes, tuple([] for _ in boxes)).clipped()


def to_tensors(scene: Scene) -> tuple[Tensor, Tensor]:
    """Image `[3, H, W]` uint8 RGB and labels `[n, 5]`: class, centre and size as fractions."""
    height, width = scene.shape
    image = np.ascontiguousarray(scene.image[..., ::-1].transpose(2, 0, 1))
    boxes = scene.boxes / np.array([width, height, width, height], np.float32)
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    labels = np.concatenate([scene.classes[:, None], centre, size], 1).astype(np.float32)
    return torch.from_numpy(image), torch.from_numpy(labels)


def stretched(side: int, stride: int, factor: float) -> int:
    """Pixels of a scaled side, the nearest multiple of the stride."""
    return max(1, round(side * factor / stride)) * stride


def stretch(images: Tensor, stride: int, rng: Generator) -> Tensor:
    """Scale a batch by 0.5 to 1.5, to sides that are multiples of the stride (multi-scale)."""
    factor = rng.uniform(*STRETCH)
    shape = [stretched(side, stride, factor) for side in images.shape[2:]]
    return torch.nn.functional.interpolate(images, shape, mode="bilinear", align_corners=False)
