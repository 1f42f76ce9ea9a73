"""What every batch does to a model: forward, loss, backward, and the optimizer's step."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from yolov7.errors import UserError
from yolov7.model import YOLOv7
from yolov7.train.data import stretch
from yolov7.train.distributed import Ranks
from yolov7.train.ema import EMA
from yolov7.train.loader import Batch
from yolov7.train.loss import Loss, LossWeights
from yolov7.train.optimizer import (
    build_optimizer,
    clip_gradients,
    first_bad_tensor,
    gradient_norm,
    restore_buffers,
    set_rates,
)
from yolov7.train.options import Train
from yolov7.train.precision import autocast
from yolov7.train.schedule import Schedule

MAX_SKIPPED = 20  # steps in a row without finite gradients


class DivergedError(UserError):
    """The numbers of a run are finite no more."""


@dataclass
class Progress:
    """How far a run is.

    Args:
        epoch: finished epochs.
        step: batches.
        last_step: batch of the last optimizer step.
        best: fitness of the best evaluation; -1: there was none.
        best_epoch: its epoch, from 1.
        seconds: in training and evaluation.
        skipped: steps without finite gradients.
        skipped_in_a_row: those since the last good one.
        stats: of the last evaluation.
    """

    epoch: int = 0
    step: int = 0
    last_step: int = -1
    best: float = -1.0
    best_epoch: int = 0
    seconds: float = 0.0
    skipped: int = 0
    skipped_in_a_row: int = 0
    stats: dict[str, float] = field(default_factory=dict)


class Step:
    """One batch after the other.

    Args:
        model: is trained in place.
        network: the model as it is called, over all ranks.
        ema: its moving average.
        loss: unweighted terms.
        weights: of the terms.
        schedule: rates.
        options: optimizer, clip, multi_scale, seed.
        dtype: what the network computes in.
        ranks: which process this is.
    """

    def __init__(
        self,
        model: YOLOv7,
        network: nn.Module,
        ema: EMA,
        loss: Loss,
        weights: LossWeights,
        schedule: Schedule,
        options: Train,
        dtype: torch.dtype,
        ranks: Ranks,
    ) -> None:
        self.model, self.network, self.ema = model, network, ema
        self.loss, self.weights, self.schedule = loss, weights, schedule
        self.options, self.dtype, self.ranks = options, dtype, ranks
        self.device = model.head.anchors.device
        self.optimizer = build_optimizer(model, options.optimizer, schedule.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=dtype == torch.float16)

    def __call__(self, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """Learn from a batch; its loss terms."""
        rates = self.schedule.at(progress.epoch, progress.step)
        set_rates(self.optimizer, rates)
        images = batch.images.to(self.device, non_blocking=True).float().div_(255)
        if self.options.multi_scale:
            rng = np.random.default_rng((self.options.seed, progress.epoch, progress.step, 1))
            images = stretch(images, self.model.stride, rng)
        images = images.contiguous(memory_format=torch.channels_last)
        with autocast(self.device, self.dtype):
            outputs = self.network(images)
        terms: dict[str, Tensor] = self.loss(outputs, batch.labels)
        total = torch.stack(list(self.weights.weigh(terms).values())).sum() * self.schedule.batch
        torch.autograd.backward(self.scaler.scale(total))
        if progress.step - progress.last_step >= rates.accumulate:
            self._optimize(terms, progress)
            progress.last_step = progress.step
        progress.step += 1
        return terms

    def _optimize(self, terms: dict[str, Tensor], progress: Progress) -> None:
        """Step and update the moving average; gradients that are not finite are left out."""
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.model)
        if math.isfinite(norm):
            clip_gradients(self.model, norm, self.options.clip)
            self.scaler.step(self.optimizer)
            self.ema.update(self.model)
            progress.skipped_in_a_row = 0
        else:
            name = first_bad_tensor(self.model, terms)
            restore_buffers(self.model, self.ema.model)
            progress.skipped += 1
            progress.skipped_in_a_row += 1
            self.ranks.say(f"batch {progress.step}: {name} is not finite: this step is skipped")
            if progress.skipped_in_a_row >= MAX_SKIPPED:
                raise DivergedError(
                    f"{MAX_SKIPPED} steps in a row without finite gradients, {name} first: lower "
                    "the learning rate (--set lr0 0.001), or use --precision fp32 or --clip 10"
                )
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def state_dict(self) -> dict[str, Any]:
        """All that the next batches depend on."""
        pending = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gradients": pending,  # of batches since the last step
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where a state was taken."""
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.ema.updates = int(state["updates"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        parameters = dict(self.model.named_parameters())
        for name, gradient in state["gradients"].items():
            parameters[name].grad = gradient.to(self.device)
