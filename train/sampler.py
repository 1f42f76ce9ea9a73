"""Which images make a batch: order seeded per epoch, each rank's share of every step."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from yolov7.dataset import Dataset, Sample
from yolov7.letterbox import letterbox_geometry

OTHERS = 17  # images that a mosaic of nine, blended with another, shows beside its own


class Key(NamedTuple):
    """What an item of an epoch is made from."""

    epoch: int
    position: int  # in the epoch
    image: int  # index in the data set
    shape: tuple[int, int]  # height and width of the result
    others: tuple[int, ...] = ()  # images to join it in mosaics; none: any, alike
    mosaic: bool = True  # whether it may be a mosaic


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
        mosaics: epochs from the first on that may have mosaics; None: all of them.
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
    mosaics: int | None = None
    epoch: int = 0

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self.count // (self.batch * self.world))

    def __iter__(self) -> Iterator[list[Key]]:
        """The batches of the current epoch."""
        rng = np.random.default_rng((self.seed, self.epoch))
        whole = self.batch * self.world
        order = np.resize(self._order(rng), len(self) * whole)
        others = np.zeros((len(order), 0), np.int64)
        if self.weights is not None:
            share = self.weights / self.weights.sum()
            others = rng.choice(self.count, (len(order), OTHERS), p=share)
        steps = order.reshape(-1, self.world, self.batch)
        mosaic = self.mosaics is None or self.epoch < self.mosaics
        sequence = np.arange(len(steps))
        if self.shapes is not None:
            sequence = rng.permutation(sequence)  # neighbours in aspect share a batch
        for step in sequence.tolist():
            start = (step * self.world + self.rank) * self.batch
            members = steps[step, self.rank].tolist()
            shape = self._shape(steps[step].ravel().tolist())
            yield [
                Key(self.epoch, at, index, shape, tuple(others[at].tolist()), mosaic)
                for at, index in enumerate(members, start)
            ]

    def _order(self, rng: np.random.Generator) -> NDArray[np.int64]:
        if self.weights is not None:
            share = self.weights / self.weights.sum()
            order = rng.choice(self.count, self.count, p=share)
        elif self.shapes is not None:
            order = np.arange(self.count)
        else:
            return rng.permutation(self.count)
        if self.shapes is not None:
            aspects = np.array([height / width for height, width in self.shapes])
            order = order[np.argsort(aspects[order], kind="stable")]
        return order

    def _shape(self, members: list[int]) -> tuple[int, int]:
        if self.shapes is None:
            return self.size, self.size
        heights, widths = zip(*(self.shapes[i] for i in members), strict=True)
        return max(heights), max(widths)


def rectangles(samples: list[Sample], size: int, stride: int) -> list[tuple[int, int]]:
    """The smallest canvas, in multiples of the stride, of each image at the given longer side."""
    return [
        letterbox_geometry((s.height, s.width), size, stride=stride, auto=True).shape
        for s in samples
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
    counts = np.stack([np.bincount(s.labels.classes, minlength=nc) for s in dataset.samples])
    weights = counts @ ((1 - ap) ** 2 / np.maximum(counts.sum(0), 1))
    return weights if weights.sum() > 0 else np.ones(len(counts))
