"""Batches of training images from worker processes, which nothing but their end stops."""

import multiprocessing
import os
import pickle
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from yolov7.cores import usable_cores
from yolov7.dataset import Dataset
from yolov7.errors import UserError
from yolov7.model import YOLOv7
from yolov7.train.assigner import pad_labels
from yolov7.train.config import Augmentation
from yolov7.train.data import Augment, Item, TrainingData
from yolov7.train.distributed import Ranks
from yolov7.train.options import EPOCHS, Train
from yolov7.train.sampler import EpochSampler, image_weights, rectangles

STALLED = 300  # seconds without a batch: hundreds of times what one takes on a slow disk
FULL = (
    "shared memory is too small for the batches of the workers, which come through pipes instead "
    "and more slowly: give it more (docker run --shm-size 2g), or use fewer --workers"
)


class Batch(NamedTuple):
    """What the loader yields.

    Args:
        images: `[B, 3, H, W]` uint8, RGB.
        labels: `[B, M, 5]` class, centre x, centre y, width, height; -1 pads (see `assigner`).
        notes: what is to be said about them.
    """

    images: Tensor
    labels: Tensor
    notes: tuple[str, ...] = ()


class _Piped(NamedTuple):
    """A batch that did not fit into shared memory: arrays, which are sent by value."""

    images: NDArray[Any]
    labels: NDArray[Any]
    notes: tuple[str, ...]


def collate(items: list[Item]) -> Batch | _Piped:
    """Stack images and pad labels."""
    images, labels, notes = zip(*items, strict=True)
    said = tuple(line for lines in notes for line in lines)
    batch = Batch(torch.stack(images), pad_labels(labels), said)
    if get_worker_info() is None:
        return batch
    try:
        # Here and not when the batch is sent: a thread does that, and if it fails the batch is
        # lost and waited for without end.
        return batch._replace(
            images=batch.images.share_memory_(), labels=batch.labels.share_memory_()
        )
    except RuntimeError:
        return _Piped(batch.images.numpy(), batch.labels.numpy(), (*said, FULL))


class Loader(DataLoader[Item]):
    """A loader of `Batch`es; set `sampler.epoch` before each epoch.

    Args:
        data: the images.
        sampler: which of them make a batch.
        workers: processes that prepare them; None: one per core, at most 8, shared among the
            ranks of a machine.
        pin: whether batches are to lie in pinned memory.
    """

    def __init__(
        self,
        data: TrainingData,
        sampler: EpochSampler,
        *,
        workers: int | None,
        pin: bool,
    ) -> None:
        if workers is None:
            ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            workers = max(1, min(8, usable_cores() // ranks))
        super().__init__(
            data,
            batch_sampler=sampler,
            num_workers=workers,
            collate_fn=collate,
            pin_memory=pin,
            persistent_workers=workers > 0,
            worker_init_fn=_start_worker,
            timeout=STALLED if workers else 0,
        )
        self.augment = data.augment

    def __iter__(self) -> Any:
        """The batches of an epoch; the workers are started, where they do not wait already.

        Raises:
            UserError: they cannot be started, one died, or there is no batch for five minutes.
        """
        try:
            if not self.num_workers or multiprocessing.get_start_method() == "fork":
                batches = super().__iter__()
            else:
                with _without_script(self.augment):
                    batches = super().__iter__()
        except OSError as error:
            raise UserError(f"workers cannot be started ({error}): use --workers 0") from None
        return self._checked(batches)

    def _checked(self, batches: Iterator[Any]) -> Iterator[Batch]:
        while True:
            try:
                batch = next(batches)
            except StopIteration:
                return
            except UserError as error:
                if not self.num_workers:
                    raise
                # The text of a worker's error is its traceback, which ends in its own text.
                raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
            except RuntimeError as error:
                reason = str(error).partition(chr(10))[0]
                if not reason.startswith(("DataLoader worker (", "DataLoader timed out")):
                    raise
                raise UserError(
                    f"{reason}: see whether memory or the disk is the reason, use fewer --workers"
                ) from None
            if isinstance(batch, _Piped):
                images, labels = torch.from_numpy(batch.images), torch.from_numpy(batch.labels)
                batch = Batch(images, labels, batch.notes)
            yield batch


def training_loader(
    options: Train,
    dataset: Dataset,
    model: YOLOv7,
    augmentation: Augmentation,
    batch: int,
    ranks: Ranks,
    augment: Augment | None,
) -> tuple[EpochSampler, Loader]:
    """Augmented images, each rank's share of every batch, and the order that they come in.

    Args:
        options: cache, image weights, rectangles, seed and workers.
        dataset: the images.
        model: gives their side and stride.
        augmentation: of the hyper-parameters.
        batch: images of a step of this rank.
        ranks: which process this is.
        augment: see `TrainingData`.
    """
    samples, size, seed = dataset.samples, model.imgsz, options.seed
    data = TrainingData(
        dataset, size, augmentation, augment=augment, seed=seed, cache=options.cache
    )
    sampler = EpochSampler(
        len(samples),
        batch,
        size,
        seed=seed,
        rank=ranks.rank,
        world=ranks.world,
        shapes=rectangles(samples, size, model.stride) if options.rect else None,
        mosaics=(options.epochs or EPOCHS) - options.no_mosaic_epochs,
    )
    if options.image_weights:
        sampler.weights = image_weights(dataset, np.zeros(len(dataset.names)))
    pin = model.head.anchors.is_cuda
    return sampler, Loader(data, sampler, workers=options.workers, pin=pin)


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
