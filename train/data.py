"""Training batches: what is read, augmentation seeded per sample, the loader.

Whatever an item of an epoch shows follows from (seed, epoch, position) alone, not from workers,
ranks or what was loaded before: runs are reproducible and resume exactly.
"""

import multiprocessing
import os
import pickle
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.random import Generator
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from yolov7.dataset import Dataset, load_data
from yolov7.errors import UserError
from yolov7.train.assigner import pad_labels
from yolov7.train.augment import Augmenter
from yolov7.train.config import Augmentation
from yolov7.train.images import CacheKind, ImageStore
from yolov7.train.paste import build_bank
from yolov7.train.sampler import EpochSampler, Key
from yolov7.train.scene import Scene

Augment = Callable[[Scene, Generator], Scene]
STRETCH = (0.5, 1.5)  # of a batch, in multi-scale training


def read_data(data: str, split: str, val_split: str) -> tuple[Dataset, Dataset]:
    """The splits to train and to evaluate on.

    Raises:
        UserError: a split is missing.
    """
    if not data:
        raise UserError("nothing to train on: give --data, such as a data.yaml or a COCO json")
    return load_data(data, split), load_data(data, val_split)


def check_data(train: Dataset, val: Dataset) -> None:
    """See whether there is something to learn, and whether it is what is evaluated.

    Raises:
        UserError: there is no box to train on, or the classes differ.
    """
    if not sum(int((~sample.labels.crowd).sum()) for sample in train.samples):
        raise UserError(
            f"the {len(train.samples)} images to train on have not a single box, the first is "
            f"{train.samples[0].path}: check where the labels lie"
        )
    if train.names != val.names:
        raise UserError(
            f"trained on are the classes {train.names}, evaluated {val.names}: make them alike"
        )


class Batch(NamedTuple):
    """What the loader yields.

    Args:
        images: `[B, 3, H, W]` uint8, RGB.
        labels: `[B, M, 5]` class, centre x, centre y, width, height; -1 pads (see `assigner`).
    """

    images: Tensor
    labels: Tensor


class TrainingData(TorchDataset[tuple[Tensor, Tensor]]):
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
        bank = []
        if augmentation.paste_in:
            counts = [sum(map(bool, sample.labels.polygons)) for sample in dataset.samples]
            bank = build_bank(self.store, counts, np.random.default_rng(seed))
        count = len(dataset.samples)
        self.augmenter = Augmenter(augmentation, size, self.store, count, bank)
        self.augment = augment

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        """Image `[3, H, W]` uint8 RGB and labels `[n, 5]`.

        Raises:
            ValueError: `augment` gives an image of another size or kind, or another number of
                classes than of boxes.
        """
        rng = np.random.default_rng((self.seed, key.epoch, key.position))
        scene = self.augmenter(key.image, key.shape, rng)
        return to_tensors(scene if self.augment is None else augmented(scene, self.augment, rng))


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


def collate(items: list[tuple[Tensor, Tensor]]) -> Batch:
    """Stack images and pad labels."""
    images, labels = zip(*items, strict=True)
    return Batch(torch.stack(images), pad_labels(labels))


class Loader(DataLoader[tuple[Tensor, Tensor]]):
    """A loader of `Batch`es; set `sampler.epoch` before each epoch.

    Args:
        data: the images.
        sampler: which of them make a batch.
        workers: processes that prepare them; None: one per core, at most 8, shared among the
            ranks of a machine.
        pin: whether batches are to lie in pinned memory.
        keep: whether the workers wait for the next epoch, or end with each.
    """

    def __init__(
        self,
        data: TrainingData,
        sampler: EpochSampler,
        *,
        workers: int | None,
        pin: bool,
        keep: bool = True,
    ) -> None:
        if workers is None:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = max(1, min(8, (os.cpu_count() or 1) // ranks))
        super().__init__(
            data,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin,
            persistent_workers=keep and workers > 0,
            worker_init_fn=_start_worker,
        )
        self.augment = data.augment

    def __iter__(self) -> Any:
        """Start the workers, where they do not wait already."""
        if not self.num_workers or multiprocessing.get_start_method() == "fork":
            return super().__iter__()
        with _without_script(self.augment):
            return super().__iter__()


@contextmanager
def _without_script(augment: Augment | None) -> Iterator[None]:
    """Start processes that do not run the user's script again, unless `augment` is defined there.

    Spawned ones and those of a fork server import `__main__`; a script that does not ask for
    `__name__ == "__main__"` would begin its training anew in each of them.

    Raises:
        UserError: `augment` cannot be sent to processes.
    """
    try:
        needed = b"__main__" in pickle.dumps(augment)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(
            f"augment cannot be sent to the workers ({error}): define it at the top of a module, "
            "or use workers=0"
        ) from None
    script = sys.modules["__main__"]
    if not needed:
        sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = script


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # workers are the parallelism
    torch.set_num_threads(1)


def stretched(side: int, stride: int, factor: float) -> int:
    """Pixels of a scaled side, the nearest multiple of the stride."""
    return max(1, round(side * factor / stride)) * stride


def stretch(images: Tensor, stride: int, rng: Generator) -> Tensor:
    """Scale a batch by 0.5 to 1.5, to sides that are multiples of the stride (multi-scale)."""
    factor = rng.uniform(*STRETCH)
    shape = [stretched(side, stride, factor) for side in images.shape[2:]]
    return torch.nn.functional.interpolate(images, shape, mode="bilinear", align_corners=False)
