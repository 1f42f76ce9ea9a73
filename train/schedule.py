"""Learning rate, momentum and accumulation as pure functions of epoch and batch number."""

import math
from dataclasses import dataclass

from yolov7.train.config import HyperParameters

NOMINAL_BATCH = 64
MIN_WARMUP = 1000  # batches


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
    """

    hyper: HyperParameters
    epochs: int
    batches: int
    batch: int
    linear: bool = False

    @property
    def warmup(self) -> int:
        """Batches of warm-up: no fewer than 1000, unless there is to be none."""
        asked = round(self.hyper.warmup_epochs * self.batches)
        return max(asked, MIN_WARMUP) if self.hyper.warmup_epochs > 0 else 0

    @property
    def accumulate(self) -> int:
        """Batches per step after the warm-up."""
        return max(1, round(NOMINAL_BATCH / self.batch))

    @property
    def weight_decay(self) -> float:
        """Weight decay for the images that a step really sums over."""
        return self.hyper.weight_decay * self.batch * self.accumulate / NOMINAL_BATCH

    def factor(self, epoch: int) -> float:
        """Learning rate of an epoch over lr0."""
        progress = epoch / self.epochs
        if not self.linear:
            progress = (1 - math.cos(math.pi * progress)) / 2
        return 1 + progress * (self.hyper.lrf - 1)

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
            accumulate=max(1, round(rise(1, NOMINAL_BATCH / self.batch))),
        )
