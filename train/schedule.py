"""Learning rate, momentum and accumulation as pure functions of epoch and batch number."""

import math
from dataclasses import dataclass, replace

from yolov7.train.config import HyperParameters

# The authors step once in 64 images. A run of 200 images and 30 epochs would have 100 steps, where
# its batches of 16 are 400. So shorter runs step once in 16 images.
NOMINAL_BATCH, SHORT_BATCH = 64, 16
# The authors' warm-up lasts 3 epochs, at least 1000 batches. A run of 200 images and 100 epochs is
# 1300 batches, and would spend three quarters of them with a learning rate that is still rising and
# a hundred times that for the biases. So shorter runs warm up for a tenth.
AUTHORS_EPOCHS, AUTHORS_BATCHES = 3, 1000
LONG = 10_000  # batches of a run that does both as the authors do
SHARE = 0.1  # of a shorter run


@dataclass(frozen=True)
class Rates:
    """What the optimizer works with at one batch.

    Args:
        lr: learning rate of all parameters but biases.
        bias_lr: learning rate of biases.
        momentum: of SGD, or Adam's first beta.
        accumulate: batches whose gradients are summed before a step.
    """

    lr: float
    bias_lr: float
    momentum: float
    accumulate: int


@dataclass(frozen=True)
class Schedule:
    """The course of a training run.

    Args:
        hyper: rates and warm-up.
        epochs: length of the run.
        batches: batches per epoch.
        batch: images per batch, on all ranks together.
        linear: fall linearly from lr0 to lr0 x lrf instead of along a cosine.
        every: batches per step after the warm-up; None: as many as make 64 images, 16 in a run of
            up to 10,000 batches.
    """

    hyper: HyperParameters
    epochs: int
    batches: int
    batch: int
    linear: bool = False
    every: int | None = None

    @property
    def warmup(self) -> int:
        """Batches of warm-up, of weights and biases alike."""
        if self.hyper.warmup_epochs is not None:
            return round(self.hyper.warmup_epochs * self.batches)
        authors = max(AUTHORS_EPOCHS * self.batches, AUTHORS_BATCHES)
        return min(authors, round(SHARE * self.epochs * self.batches)) if self.short else authors

    @property
    def short(self) -> bool:
        """Whether warm-up and accumulation are those of a short run."""
        return self.epochs * self.batches <= LONG

    @property
    def accumulate(self) -> int:
        """Batches per step after the warm-up, at most those of an epoch."""
        return max(1, min(round(self._every), self.batches))

    @property
    def _every(self) -> float:
        if self.every is not None:
            return self.every
        return (SHORT_BATCH if self.short else NOMINAL_BATCH) / self.batch

    @property
    def weight_decay(self) -> float:
        """Weight decay for the images that a step really sums over."""
        return self.hyper.weight_decay * self.batch * self.accumulate / NOMINAL_BATCH

    def __str__(self) -> str:
        """What a person wants to know of it, in a line."""
        step = "batch" if self.accumulate == 1 else f"{self.accumulate} batches"
        by_rule = self.short and self.hyper.warmup_epochs is None
        why = f" (as in all runs of up to {LONG})" if by_rule else ""
        return (
            f"{self.epochs} epochs of {self.batches} batches of {self.batch} images, a step every "
            f"{step}; warm-up {self.warmup} batches{why}"
        )

    def factor(self, epoch: int) -> float:
        """Learning rate of an epoch over lr0."""
        progress = epoch / self.epochs
        if not self.linear:
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 + progress * (self.hyper.lrf - 1)

    def compared_with(self, epochs: int, epoch: int, step: int) -> str:
        """What another number of epochs makes of the rate of a batch, in a line."""
        before, now = (replace(self, epochs=n).at(epoch, step).lr for n in (epochs, self.epochs))
        return (
            f"the learning rate goes on at {now:.2g}, {now / max(before, 1e-12):.2g} times that of "
            f"{epochs} epochs"
        )

    def at(self, epoch: int, step: int) -> Rates:
        """The rates of a batch; `step` counts batches from the start of the run."""
        lr = self.hyper.lr0 * self.factor(epoch)
        if step >= self.warmup:
            return Rates(lr, lr, self.hyper.momentum, self.accumulate)
        done = step / self.warmup

        def rise(start: float, end: float) -> float:
            return start + (end - start) * done

        return Rates(
            lr=rise(0.0, lr),
            bias_lr=rise(self.hyper.warmup_bias_lr, lr),
            momentum=rise(self.hyper.warmup_momentum, self.hyper.momentum),
            accumulate=max(1, min(round(rise(1, self._every)), self.batches)),
        )
