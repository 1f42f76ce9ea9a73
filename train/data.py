"""Training batches: cached images, augmentation seeded per sample, order seeded per epoch.

Whatever an item of an epoch shows follows from (seed, epoch, position) alone, not from workers,
ranks or what was loaded before: runs are reproducible and resume exactly.
"""

import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from torch.utils.data import Dataset as TorchDataset

from yolov7.cache import cache_folder
from yolov7.dataset import Dataset, Sample
from yolov7.images import read_image
from yolov7.letterbox import Image
from yolov7.progress import progress
from yolov7.train.assigner import pad_labels
from yolov7.train.augment import Augmenter
from yolov7.train.config import Augmentation
from yolov7.train.paste import build_bank
from yolov7.train.scene import Scene

CacheKind = Literal["none", "ram", "disk"]
STRETCH = (0.5, 1.5)  # of a batch, in multi-scale training
READERS = 8  # threads that fill the RAM cache


class Batch(NamedTuple):
    """What the loader yields.

    Args:
        images: `[B, 3, H, W]` uint8, RGB.
        labels: `[B, M, 5]` class, centre x, centre y, width, height; -1 pads (see `assigner`).
    """

    images: Tensor
    labels: Tensor


class Key(NamedTuple):
    """What an item of an epoch is made from."""

    epoch: int
    position: int  # in the epoch
    image: int  # index in the data set
    shape: tuple[int, int]  # height and width of the result


class ImageStore:
    """The images of a data set, their longer side scaled to `size`.

    Args:
        samples: the images.
        size: pixels.
        cache: keep scaled images in RAM (read at once), on the disk (in the user's cache folder,
            when first read), or not.
    """

    def __init__(self, samples: list[Sample], size: int, cache: CacheKind = "none") -> None:
        self.samples = samples
        self.size = size
        self.cache = cache
        self._ram: list[Image] = []
        if cache == "ram":
            with ThreadPoolExecutor(READERS) as pool:
                images = pool.map(self._read, samples)
                self._ram = list(progress(images, "reading images", len(samples)))

    def __call__(self, index: int) -> Scene:
        """Image `index` with its objects."""
        sample = self.samples[index]
        if self._ram:
            image = self._ram[index]
        elif self.cache == "disk":
            image = self._from_disk(sample)
        else:
            image = self._read(sample)
        return Scene.from_labels(image, sample, sample.height, sample.width)

    def _read(self, sample: Sample) -> Image:
        longest = max(sample.height, sample.width)
        # The decoder of JPEG shrinks for nothing: a quarter of the pixels, a third of the time.
        shrink = next((factor for factor in (8, 4, 2) if longest >= factor * self.size), 1)
        image: NDArray[Any] = read_image(sample.path, shrink=shrink)
        ratio = self.size / longest
        width, height = (max(1, round(side * ratio)) for side in (sample.width, sample.height))
        if image.shape[:2] != (height, width):
            image = cv2.resize(image, (width, height))
        return np.asarray(image, np.uint8)

    def _from_disk(self, sample: Sample) -> Image:
        status = sample.path.stat()
        key = f"{sample.path.resolve()} {status.st_size} {status.st_mtime_ns} {self.size}"
        file = cache_folder("images") / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npy"
        try:
            return np.asarray(np.load(file), np.uint8)
        except (OSError, ValueError, EOFError):
            image = self._read(sample)
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f"{file.stem}.{os.getpid()}")
        with temporary.open("wb") as handle:
            np.save(handle, image)
        temporary.replace(file)
        return image


class TrainingData(TorchDataset[tuple[Tensor, Tensor]]):
    """Augmented training images.

    Args:
        dataset: labelled images.
        size: side of the images in pixels.
        augmentation: what happens to them.
        seed: of everything random.
        cache: see `ImageStore`.
    """

    def __init__(
        self,
        dataset: Dataset,
        size: int,
        augmentation: Augmentation,
        *,
        seed: int = 0,
        cache: CacheKind = "none",
    ) -> None:
        self.seed = seed
        self.store = ImageStore(dataset.samples, size, cache)
        bank = []
        if augmentation.paste_in:
            counts = [sum(map(bool, sample.polygons)) for sample in dataset.samples]
            bank = build_bank(self.store, counts, np.random.default_rng(seed))
        count = len(dataset.samples)
        self.augmenter = Augmenter(augmentation, size, self.store, count, bank)

    def __getitem__(self, key: Key) -> tuple[Tensor, Tensor]:
        """Image `[3, H, W]` uint8 RGB and labels `[n, 5]`."""
        rng = np.random.default_rng((self.seed, key.epoch, key.position))
        scene = self.augmenter(key.image, key.shape, rng)
        return to_tensors(scene)


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
    numbered = [torch.cat([x.new_full((len(x), 1), i), x], 1) for i, x in enumerate(labels)]
    return Batch(torch.stack(images), pad_labels(torch.cat(numbered), len(images)))


@dataclass
class EpochSampler(Sampler[list[Key]]):
    """The batches of an epoch: shuffled, all of them full, each rank's share.

    The last batch is filled up from the start of the epoch's order, so that every step and every
    rank works on the same number of images.

    Args:
        count: images in the data set.
        batch: images of a step of this rank.
        size: side of the images in pixels.
        seed: of the order.
        rank, world: this rank's share.
        shapes: with rectangular batches, height and width of each image's batch by `group_shapes`.
        weights: how often an image is drawn, `[count]`; None: each once.
        epoch: which epoch's order comes next.
    """

    count: int
    batch: int
    size: int
    seed: int = 0
    rank: int = 0
    world: int = 1
    shapes: list[tuple[int, int]] | None = None
    weights: NDArray[np.float64] | None = None
    epoch: int = 0

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.count // (self.batch * self.world))

    def __iter__(self) -> Iterator[list[Key]]:
        """The batches of the current epoch."""
        rng = np.random.default_rng((self.seed, self.epoch))
        whole = self.batch * self.world
        order = self._order(rng)
        order = np.resize(order, len(self) * whole)
        steps = order.reshape(-1, self.world, self.batch)
        sequence = np.arange(len(steps))
        if self.shapes is not None:
            sequence = rng.permutation(sequence)  # neighbours in aspect share a batch
        for step in sequence.tolist():
            start = (step * self.world + self.rank) * self.batch
            members = steps[step, self.rank].tolist()
            shape = self._shape(steps[step].ravel().tolist())
            yield [Key(self.epoch, start + i, index, shape) for i, index in enumerate(members)]

    def _order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        if self.weights is not None:
            share = self.weights / self.weights.sum()
            return rng.choice(self.count, self.count, p=share)
        if self.shapes is not None:
            aspects = [height / width for height, width in self.shapes]
            return np.argsort(aspects, kind="stable")
        return rng.permutation(self.count)

    def _shape(self, members: list[int]) -> tuple[int, int]:
        if self.shapes is None:
            return self.size, self.size
        heights, widths = zip(*(self.shapes[i] for i in members), strict=True)
        return max(heights), max(widths)


def rectangles(samples: list[Sample], size: int, stride: int) -> list[tuple[int, int]]:
    """The smallest canvas, in multiples of the stride, of each image at the given longer side."""

    def side(pixels: float) -> int:
        return max(1, -(-round(pixels) // stride)) * stride

    ratios = [size / max(sample.height, sample.width) for sample in samples]
    return [
        (side(sample.height * r), side(sample.width * r))
        for sample, r in zip(samples, ratios, strict=True)
    ]


def image_weights(dataset: Dataset, ap: NDArray[np.float64]) -> NDArray[np.float64]:
    """How often each image is to be drawn: for rare classes, and for those with a low AP.

    Args:
        dataset: the images.
        ap: `[nc]` of each class.

    Returns:
        `[n]`, any sum.
    """
    nc = len(dataset.names)
    counts = np.stack([np.bincount(s.classes, minlength=nc) for s in dataset.samples])
    weights = counts @ ((1 - ap) ** 2 / np.maximum(counts.sum(0), 1))
    return weights if weights.sum() > 0 else np.ones(len(counts))


def build_loader(
    data: TrainingData, sampler: EpochSampler, *, workers: int, pin: bool, keep: bool = True
) -> DataLoader[tuple[Tensor, Tensor]]:
    """A loader of `Batch`es; set `sampler.epoch` before each epoch.

    Args:
        data: The images.
        sampler: Which of them make a batch.
        workers: Processes that prepare them.
        pin: Whether batches are to lie in pinned memory.
        keep: Whether the workers wait for the next epoch, or end with each.
    """
    return DataLoader(
        data,
        batch_sampler=sampler,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin,
        persistent_workers=keep and workers > 0,
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    cv2.setNumThreads(0)  # workers are the parallelism
    torch.set_num_threads(1)


def stretched(side: int, stride: int, factor: float) -> int:
    """Pixels of a scaled side, the nearest multiple of the stride."""
    return max(1, round(side * factor / stride)) * stride


def stretch(images: Tensor, stride: int, rng: np.random.Generator) -> Tensor:
    """Scale a batch by 0.5 to 1.5, to sides that are multiples of the stride (multi-scale)."""
    factor = rng.uniform(*STRETCH)
    shape = [stretched(side, stride, factor) for side in images.shape[2:]]
    return torch.nn.functional.interpolate(images, shape, mode="bilinear", align_corners=False)
