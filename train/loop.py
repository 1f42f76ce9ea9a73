"""The training run, from options to weights."""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from yolov7.checkpoint import load_model, save_model
from yolov7.device import resolve_device
from yolov7.engine.cpu import keep_freed_memory
from yolov7.errors import UserError
from yolov7.evaluate import Settings
from yolov7.model import YOLOv7
from yolov7.runs import new_run
from yolov7.train import prepare
from yolov7.train.autobatch import largest_batch
from yolov7.train.config import UNCHANGED, HyperParameters
from yolov7.train.data import (
    STRETCH,
    Batch,
    EpochSampler,
    TrainingData,
    build_loader,
    image_weights,
    rectangles,
    stretch,
    stretched,
)
from yolov7.train.distributed import Ranks, collect, over_ranks, process_group, share
from yolov7.train.ema import EMA
from yolov7.train.loss import LossWeights
from yolov7.train.optimizer import (
    build_optimizer,
    clip_gradients,
    first_bad_tensor,
    gradient_norm,
    restore_buffers,
    set_rates,
)
from yolov7.train.options import Train
from yolov7.train.plots import Plotter, can_plot, save_batch
from yolov7.train.report import Callback, CsvWriter, Meter, Result, TensorBoard, epoch_line, merged
from yolov7.train.schedule import Schedule
from yolov7.train.state import State, load_state, save_state
from yolov7.train.validation import Validation, ValidationLoss, fitness, validate

MAX_SKIPPED = 20  # steps in a row without finite gradients
PICTURED = 3  # batches that are drawn
# What a run counts besides its epochs.
COUNTERS = ("step", "last_step", "best", "best_epoch", "seconds", "skipped", "skipped_in_a_row")
REPORTED = (
    *("AP", "AP50", "AP75", "precision", "recall"),
    *("val_box", "val_objectness", "val_classes"),
)


def train(options: Train, callbacks: Sequence[Callback] = ()) -> Result:
    """Train a model, or go on with a run.

    Args:
        options: what to do.
        callbacks: told about the run, after those of the run folder.

    Returns:
        How it went; the weights are in `weights` of the run's folder, `last` and `best`.

    Raises:
        UserError: the options, the data or the weights cannot be used, or the run diverged.
    """
    prepare.check_numbers(options)
    state: State = {}
    if options.resume is not None:
        state = load_state(Path(options.resume))
        options = prepare.resumed_options(options, state)
    device = resolve_device(options.device)
    with process_group(device) as ranks:
        if device.type == "cuda" and ranks.world > 1:
            device = torch.device("cuda", ranks.local)
        return Run(options, device, ranks, state).train(callbacks)


class Run:
    """One process's part of a training run.

    Args:
        options: what to do.
        device: to train on.
        ranks: which process this is.
        state: to go on from; empty for a new run.
    """

    def __init__(self, options: Train, device: torch.device, ranks: Ranks, state: State) -> None:
        self.options, self.device, self.ranks = options, device, ranks
        self.folder = Path(options.project if options.resume is None else options.resume)
        self.epochs = prepare.EPOCHS if options.epochs is None else options.epochs
        self.epoch = self.step = 0  # finished epochs, batches
        self.last_step = -1  # batch of the last optimizer step
        self.best, self.best_epoch = -1.0, 0
        self.seconds = 0.0
        self.skipped = self.skipped_in_a_row = 0
        self.stats: dict[str, float] = {}
        if device.type == "cpu":
            keep_freed_memory()

        self.dataset, self.val = prepare.read_data(options)
        for line in self.dataset.skipped:
            self._say(f"left out: {line}")
        self.hyper, model = self._model(state)
        self.size = prepare.image_size(options, model)
        model.imgsz = self.size
        prepare.freeze(model, options.freeze)
        if options.autoanchor and not state:
            self._say(prepare.fit_model_anchors(model, self.dataset, self.size, options.seed))
        self.dtype = prepare.training_dtype(options.precision, device)
        self.model = model.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
        self.loss = prepare.head_loss(model, self.hyper, plain=options.plain_loss)
        self.weights = LossWeights.scaled(
            self.hyper.box,
            self.hyper.obj,
            self.hyper.cls,
            levels=len(model.head.strides),
            nc=model.head.num_classes,
            size=self.size,
        )
        self.batch = self._batch_size()
        self.val_loss = self._val_loss()
        self.ema = EMA(self.model)
        self.network = over_ranks(self.model, device, ranks, sync_bn=options.sync_bn)
        self.sampler, self.loader = self._loader()
        self.schedule = Schedule(
            self.hyper, self.epochs, len(self.sampler), self.batch, options.linear_lr
        )
        decay = self.schedule.weight_decay
        self.optimizer = build_optimizer(self.model, options.optimizer, decay)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)
        if state:
            self._restore(state)

    def train(self, callbacks: Sequence[Callback] = ()) -> Result:
        """Train until the epochs are done, or another limit is reached."""
        if self.options.resume is None:
            made = new_run(self.folder, self.options.name) if self.ranks.main else None
            self.folder = share(made, self.ranks)
        own = self._own_callbacks() if self.ranks.main else []
        others = callbacks if self.ranks.main else []
        for callback in (*own, *others):
            callback.on_start(self.folder, asdict(self.options))
        stopped = ""
        started = perf_counter() - self.seconds
        while not stopped:
            row = self._train_epoch()
            self.epoch += 1
            validation = None
            stopped = self._limit(started)
            if stopped or self.epoch % self.options.val_every == 0:
                validation = self._validate()
                stopped = self._limit(started) or self._no_better()
            row |= {name: self.stats[name] if validation else math.nan for name in REPORTED}
            # The row first: one too many is cut when the run is resumed, one too few is lost.
            for callback in own:
                callback.on_epoch(row, validation)
            self._save()
            for callback in others:
                callback.on_epoch(row, validation)
            self._say(epoch_line(row, self.epochs))
        hours = self.seconds / 3600
        result = Result(
            self.folder, self.epoch, self.best_epoch, self.best, self.stats, hours, stopped
        )
        for callback in (*own, *others):
            callback.on_end(result)
        return result

    def _train_epoch(self) -> dict[str, float]:
        """One pass over the images; its row of results.csv, without the evaluation."""
        self.model.train()
        prepare.frozen_to_eval(self.model, self.options.freeze)
        self.sampler.epoch = self.epoch
        title = f"epoch {self.epoch + 1}/{self.epochs}"
        lr = self.schedule.at(self.epoch, self.step).lr
        meter = Meter(f"{title}, lr {lr:.5f}", len(self.sampler), show=self.ranks.main)
        for number, batch in enumerate(meter.follow(self.loader)):
            if self.ranks.main and self.epoch == 0 and number < PICTURED:
                save_batch(batch, self.dataset.names, self.folder / f"train_batch{number}.jpg")
            terms = self._train_batch(batch)
            report = self.weights.weigh(terms) | {k: terms[k] for k in ("matches", "overflow")}
            meter.add(report, len(batch.images))
        row = merged(collect(meter.row(), self.ranks))
        return {"epoch": self.epoch + 1, "lr": lr, **row, "skipped": self.skipped}

    def _train_batch(self, batch: Batch) -> dict[str, Tensor]:
        """Forward, backward, and where it is due the optimizer's step."""
        rates = self.schedule.at(self.epoch, self.step)
        set_rates(self.optimizer, rates)
        images = batch.images.to(self.device, non_blocking=True).float().div_(255)
        if self.options.multi_scale:
            rng = np.random.default_rng((self.options.seed, self.epoch, self.step, 1))
            images = stretch(images, self.model.stride, rng)
        images = images.contiguous(memory_format=torch.channels_last)
        with prepare.autocast(self.device, self.dtype):
            outputs = self.network(images)
        terms: dict[str, Tensor] = self.loss(outputs, batch.labels)
        total = torch.stack(list(self.weights.weigh(terms).values())).sum() * self.batch
        torch.autograd.backward(self.scaler.scale(total))
        if self.step - self.last_step >= rates.accumulate:
            self._optimizer_step(terms)
            self.last_step = self.step
        self.step += 1
        return terms

    def _optimizer_step(self, terms: dict[str, Tensor]) -> None:
        """Step and update the moving average; gradients that are not finite are left out."""
        self.scaler.unscale_(self.optimizer)
        norm = gradient_norm(self.model)
        if math.isfinite(norm):
            clip_gradients(self.model, norm, self.options.clip)
            self.scaler.step(self.optimizer)
            self.ema.update(self.model)
            self.skipped_in_a_row = 0
        else:
            name = first_bad_tensor(self.model, terms)
            restore_buffers(self.model, self.ema.model)
            self.skipped += 1
            self.skipped_in_a_row += 1
            self._say(f"batch {self.step}: {name} is not finite: this step is skipped")
            if self.skipped_in_a_row >= MAX_SKIPPED:
                raise UserError(
                    f"{MAX_SKIPPED} steps in a row without finite gradients, {name} first: lower "
                    "the learning rate (--set lr0 0.001), or use --precision fp32 or --clip 10"
                )
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)

    def _validate(self) -> Validation:
        """Evaluate the moving average; note whether it is the best."""
        settings = Settings(
            imgsz=self.size,
            batch=32 if self.device.type == "cuda" else 4,
        )
        validation = validate(self.ema.model, self.val, settings, self.device, self.ranks)
        evaluation = validation.evaluation
        self.stats = {name: float(value) for name, value in evaluation.stats.items()}
        self.stats |= self.val_loss(self.ema.model, self.device, self.ranks)
        if self.options.image_weights:
            ap = np.array([max(row.ap, 0.0) for row in evaluation.per_class])
            self.sampler.weights = image_weights(self.dataset, ap)
        if (value := fitness(self.stats)) > self.best:
            self.best, self.best_epoch = value, self.epoch
        return validation

    def _limit(self, started: float) -> str:
        """Note the time; why this epoch is the last, empty: it is not."""
        self.seconds = share(perf_counter() - started, self.ranks)
        if self.epoch >= self.epochs:
            return "all epochs are done"
        hours = self.options.hours
        if hours is not None and self.seconds >= hours * 3600:
            return f"{hours:g} hours have passed"
        return ""

    def _no_better(self) -> str:
        """Why an evaluation ends the run; empty: it does not."""
        patience = self.options.patience
        if patience is not None and self.epoch - self.best_epoch >= patience:
            return f"no better model in {patience} epochs"
        return ""

    def _save(self) -> None:
        """Write weights and state; the state last, so that it never is ahead of the weights."""
        if not self.ranks.main:
            return
        about = {"epoch": self.epoch, "stats": self.stats, "training": asdict(self.options)}
        save_model(self.ema.model, self.folder / "weights" / "last.safetensors", **about)
        if self.best_epoch == self.epoch:
            save_model(self.ema.model, self.folder / "weights" / "best.safetensors", **about)
        save_state(self.folder, self._state())

    def _state(self) -> State:
        """All that the rest of the run depends on."""
        pending = {n: p.grad for n, p in self.model.named_parameters() if p.grad is not None}
        weights = self.sampler.weights
        return {
            "model": self.model.state_dict(),
            "ema": self.ema.model.state_dict(),
            "updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "gradients": pending,  # of batches since the last step
            "image_weights": None if weights is None else torch.from_numpy(weights),
            "options": asdict(self.options) | {"batch": self.batch, "resume": None},
            "hyper": asdict(self.hyper),
            "images": len(self.dataset.samples),
            "counters": {name: getattr(self, name) for name in COUNTERS},
            "epoch": self.epoch,
            "stats": self.stats,
        }

    def _restore(self, state: State) -> None:
        """Go on where a state was saved."""
        if state["images"] != len(self.dataset.samples):
            raise UserError(
                f"{self.folder} was trained on {state['images']} images, now there are "
                f"{len(self.dataset.samples)}: start a new run from its weights"
            )
        self.model.load_state_dict(state["model"])
        self.ema.model.load_state_dict(state["ema"])
        self.ema.updates = state["updates"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        for name, parameter in self.model.named_parameters():
            if name in state["gradients"]:
                parameter.grad = state["gradients"][name].to(self.device)
        if state["image_weights"] is not None:
            self.sampler.weights = state["image_weights"].numpy()
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.epoch, self.stats = state["epoch"], state["stats"]

    def _model(self, state: State) -> tuple[HyperParameters, YOLOv7]:
        """Hyper-parameters and model, of the options or of the run that is resumed."""
        if state:
            hyper = HyperParameters.from_dict(state["hyper"])
            return hyper, load_model(self.folder / "weights" / "last.safetensors")
        model, notes = prepare.build_model(self.options, self.dataset.names)
        for note in notes:
            self._say(note)
        return prepare.hyper_parameters(self.options, model), model

    def _batch_size(self) -> int:
        batch = self.options.batch
        if batch % self.ranks.world:
            raise UserError(f"--batch {batch} cannot be shared among {self.ranks.world} processes")
        if batch == 0:
            probe = copy.deepcopy(self.model).train()
            factor = STRETCH[1] if self.options.multi_scale else 1.0
            size = stretched(self.size, self.model.stride, factor)
            batch = largest_batch(probe, self.loss, size, self.device, self.dtype)
            batch = min(share(batch, self.ranks), len(self.dataset.samples)) * self.ranks.world
            self._say(f"batches of {batch} images")
        return batch

    def _loader(self) -> tuple[EpochSampler, Any]:
        options, samples = self.options, self.dataset.samples
        data = TrainingData(
            self.dataset,
            self.size,
            self.hyper.augmentation,
            seed=options.seed,
            cache=options.cache,
        )
        sampler = EpochSampler(
            len(samples),
            self.batch // self.ranks.world,
            self.size,
            seed=options.seed,
            rank=self.ranks.rank,
            world=self.ranks.world,
            shapes=rectangles(samples, self.size, self.model.stride) if options.rect else None,
        )
        if options.image_weights:
            sampler.weights = image_weights(self.dataset, np.zeros(len(self.dataset.names)))
        workers, pin = prepare.worker_count(options), self.device.type == "cuda"
        return sampler, build_loader(data, sampler, workers=workers, pin=pin)

    def _val_loss(self) -> ValidationLoss:
        """Batches of the evaluated images as they are, each rank's share."""
        samples = self.val.samples
        data = TrainingData(self.val, self.size, UNCHANGED, seed=self.options.seed)
        sampler = EpochSampler(
            len(samples),
            max(1, min(self.batch // self.ranks.world, len(samples))),
            self.size,
            rank=self.ranks.rank,
            world=self.ranks.world,
            shapes=rectangles(samples, self.size, self.model.stride),
        )
        workers, pin = prepare.worker_count(self.options), self.device.type == "cuda"
        loader = build_loader(data, sampler, workers=workers, pin=pin, keep=False)
        loss = prepare.head_loss(self.model, self.hyper, plain=True, lead_only=True)
        return ValidationLoss(loss, self.weights, loader, self.dtype)

    def _own_callbacks(self) -> list[Callback]:
        """Those that fill the run's folder."""
        callbacks: list[Callback] = [CsvWriter(self.folder / "results.csv", self.epoch)]
        settings = {"options": asdict(self.options), "hyper-parameters": asdict(self.hyper)}
        (self.folder / "arguments.json").write_text(json.dumps(settings, indent=2))
        if can_plot():
            callbacks.append(Plotter(self.folder, self.dataset))
        if find_spec("tensorboard"):
            callbacks.append(TensorBoard(self.folder))
        return callbacks

    def _say(self, text: str) -> None:
        if self.ranks.main:
            print(text, flush=True)
