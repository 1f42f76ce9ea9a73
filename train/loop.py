"""The training run, from options to weights."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import perf_counter

import numpy as np
import torch

from yolov7.checkpoint import save_model
from yolov7.dataset import Dataset
from yolov7.device import resolve_device
from yolov7.drawing import can_plot
from yolov7.engine.choose import fit
from yolov7.engine.cpu import keep_freed_memory, keep_to_quota
from yolov7.errors import UserError
from yolov7.evaluate import Settings
from yolov7.model import YOLOv7, channels_last
from yolov7.runs import new_run
from yolov7.schema import from_json
from yolov7.train.autoanchor import fit_model_anchors
from yolov7.train.autobatch import batch_size
from yolov7.train.data import Augment, fingerprint, match_classes, open_data, what_is_wrong
from yolov7.train.distributed import (
    Ranks,
    collect,
    over_ranks,
    process_group,
    share,
    use_kernels,
)
from yolov7.train.ema import EMA
from yolov7.train.ending import check_unfinished, evaluate_best, export_best
from yolov7.train.loader import training_loader
from yolov7.train.loss import LossWeights, head_loss
from yolov7.train.meter import Meter, merged
from yolov7.train.model import first_model, fitted_model, freeze, frozen_to_eval
from yolov7.train.norm import why_not_fused
from yolov7.train.options import (
    EPOCHS,
    Train,
    check_numbers,
    resumed_options,
)
from yolov7.train.plots import own_callbacks, save_batch
from yolov7.train.precision import slow_precision, training_dtype
from yolov7.train.report import Callback, Result, epoch_line, header
from yolov7.train.sampler import image_weights
from yolov7.train.schedule import Schedule
from yolov7.train.state import State, load_state, reading_state, save_state
from yolov7.train.step import Progress, Step
from yolov7.train.validation import Validation, fitness, validate

ALL_DONE = "all epochs are done"
PICTURED = 3  # batches that are drawn
REPORTED = (
    *("AP", "AP50", "AP75", "precision", "recall"),
    *("val_box", "val_objectness", "val_classes"),
)


def train(
    options: Train,
    callbacks: Sequence[Callback] = (),
    *,
    model: YOLOv7 | None = None,
    data: tuple[Dataset, Dataset] | None = None,
    augment: Augment | None = None,
) -> Result:
    """Train a model, or go on with a run.

    Args:
        options: what to do.
        callbacks: told about the run, after those of the run folder.
        model: what is trained, in place, instead of what `weights` and `variant` name; in training
            form. A run that is resumed gives it its weights.
        data: what to train and to evaluate on, instead of the splits of `options.data`.
        augment: called with every training image after the augmentations of the hyper-parameters,
            and with a generator for what is random in it: gives a `Scene` of the same size. It is
            sent to the worker processes.

    Returns:
        How it went; the weights are in `weights` of the run's folder, `last` and `best`.

    Raises:
        UserError: the options, the data or the weights cannot be used, or the run diverged.
        ValueError: a model is given that is in no training form, or beside weights.
    """
    check_numbers(options)
    if model is not None and (model.form != "training" or options.weights or options.variant):
        raise ValueError(
            f"model= takes a model in training form, this one's is {model.form}, and neither "
            "weights nor variant beside it"
        )
    state: State = {}
    note = ""
    if options.resume is not None:
        state = load_state(Path(options.resume))
        with reading_state(Path(options.resume)):
            options, note = resumed_options(options, state)
            check_unfinished(options, state, plots=can_plot())
    if options.export is not None:
        from yolov7.export import require_format  # two seconds, for torch.export

        require_format(options.export)  # before the run, not after it
    device = resolve_device(options.device)
    with process_group(device) as ranks:
        if device.type == "cuda" and ranks.world > 1:
            device = torch.device("cuda", ranks.local)
        ranks.say(note)
        run = Run(options, device, ranks, state, model=model, data=data, augment=augment)
        return run.train(callbacks)


class Run:
    """One process's part of a training run.

    Args:
        options: what to do.
        device: to train on.
        ranks: which process this is.
        state: to go on from; empty for a new run.
        model: see `train`.
        data: likewise.
        augment: likewise.
    """

    def __init__(
        self,
        options: Train,
        device: torch.device,
        ranks: Ranks,
        state: State,
        *,
        model: YOLOv7 | None = None,
        data: tuple[Dataset, Dataset] | None = None,
        augment: Augment | None = None,
    ) -> None:
        self.options, self.device, self.ranks = options, device, ranks
        self.folder = Path(options.project if options.resume is None else options.resume)
        self.epochs = EPOCHS if options.epochs is None else options.epochs
        self.progress = Progress()
        if device.type == "cpu":
            keep_freed_memory()
            keep_to_quota()

        self.train_set, self.val_set = open_data(options, data)
        self.fingerprint = fingerprint(self.train_set)
        self.told: set[str] = set()
        self._tell(what_is_wrong(self.train_set, self.val_set, strict=options.strict))

        model = model or first_model(options, self.folder, state, len(self.train_set.names))
        self.train_set, self.val_set = match_classes(self.train_set, self.val_set, model.names)
        self.hyper, model, note = fitted_model(
            options, self.folder, state, model, self.train_set.names
        )
        ranks.say(note)
        self.size = fit(options.imgsz, model)[0]
        model.imgsz = self.size
        freeze(model, options.freeze)
        if options.autoanchor and not state:
            ranks.say(fit_model_anchors(model, self.train_set, self.size, options.seed, ranks))
        dtype = training_dtype(options.precision, device)
        ranks.say(slow_precision(dtype, device))
        model = channels_last(model, device)
        loss = head_loss(
            model, plain=options.plain_loss, label_smoothing=self.hyper.label_smoothing
        )
        weights = LossWeights.scaled(
            self.hyper.box,
            self.hyper.obj,
            self.hyper.cls,
            levels=len(model.head.strides),
            nc=model.head.num_classes,
            size=self.size,
        )

        count = len(self.train_set.samples)
        batch = batch_size(options, model, loss, count, self.size, dtype, ranks)
        augmentation, share_of = self.hyper.augmentation, batch // ranks.world
        self.sampler, self.loader = training_loader(
            options, self.train_set, model, augmentation, share_of, ranks, augment
        )
        self.validated: Validation | None = None  # of the best weights
        self.validate = partial(
            validate,
            settings=Settings(imgsz=self.size, batch=32 if device.type == "cuda" else 4),
            weights=weights,
            device=device,
            ranks=ranks,
            engine=options.val_engine,
        )
        schedule = Schedule(
            self.hyper, self.epochs, len(self.sampler), batch, options.linear_lr, options.accumulate
        )
        ema = EMA(model)
        why_not = partial(why_not_fused, model, (share_of, 3, self.size, self.size), dtype)
        fused = use_kernels(options.kernels, device, why_not, ranks)
        network = over_ranks(model, device, ranks, sync_bn=options.sync_bn, fused=fused)
        self.step = Step(model, network, ema, loss, weights, schedule, options, dtype, ranks)
        if state:
            with reading_state(self.folder):
                self._restore(state)

    def train(self, callbacks: Sequence[Callback] = ()) -> Result:
        """Train until the epochs are done, or another limit is reached."""
        if self.options.resume is None:
            made = new_run(self.folder, self.options.name) if self.ranks.main else None
            self.folder = share(made, self.ranks)
        own: list[Callback] = []
        if self.ranks.main:
            own = own_callbacks(
                self.folder,
                {"options": asdict(self.options), "hyper-parameters": asdict(self.hyper)},
                self.train_set,
                self.progress.epoch,
                plots=can_plot(),
            )
        others = callbacks if self.ranks.main else []
        for callback in (*own, *others):
            callback.on_start(self.folder, asdict(self.options), self.step.model)
        self._tell(
            header(self.step.model, self.train_set, self.val_set, self.step.dtype, self.ranks)
        )
        workers = self.loader.num_workers
        self.ranks.say(f"{self.step.schedule}; {workers} workers; into {self.folder}")
        if not self.progress.step:
            self._save()  # from its first batch on, a run can be resumed
        try:
            result = self._end(self._epochs(own, others))
        except (KeyboardInterrupt, OSError, UserError):
            self.ranks.say(f"what was saved last is kept: yolov7 train --resume {self.folder}")
            raise
        for callback in (*own, *others):
            callback.on_end(result)
        if self.ranks.main and self.options.export is not None:
            export_best(self.folder, self.options.export)
        return result

    def _end(self, stopped: str) -> Result:
        """Evaluate the best weights."""
        progress = self.progress
        found = evaluate_best(
            self.folder,
            self.options,
            progress.best_epoch,
            self.train_set,
            self.validated or self.val_set,
            self.step.ema.model,
            self.validate,
            self.ranks,
            plots=can_plot(),
        )
        return Result.of(self.folder, progress, found, stopped)

    def _epochs(self, own: Sequence[Callback], others: Sequence[Callback]) -> str:
        """Train, evaluate, save, report, over and over; why that ended."""
        progress = self.progress
        stopped = ALL_DONE if progress.epoch >= self.epochs else ""  # its end was missing
        started = perf_counter() - progress.seconds
        while not stopped:
            row = self._train_epoch([*own, *others])
            progress.epoch += 1
            validation = None
            asked = next((callback.stop for callback in (*own, *others) if callback.stop), "")
            stopped = self._limit(started) or share(asked, self.ranks)
            evaluated = bool(stopped) or progress.epoch % self.options.val_every == 0
            if evaluated:
                validation = self._validate()
                stopped = self._limit(started) or stopped or self._no_better()
            row |= {name: progress.stats[name] if validation else math.nan for name in REPORTED}
            # The row first: one too many is cut when the run is resumed, one too few is lost.
            for callback in own:
                callback.on_epoch(row, validation)
            self._save()
            for callback in others:
                callback.on_epoch(row, validation)
            if evaluated:  # else one more epoch, which is: a run ends with an evaluation
                asked = next((callback.stop for callback in others if callback.stop), "")
                stopped = stopped or share(asked, self.ranks)
            self.ranks.say(epoch_line(row, self.epochs))
        return stopped

    def _train_epoch(self, callbacks: Sequence[Callback]) -> dict[str, float]:
        """One pass over the images; its row of results.csv, without the evaluation."""
        progress, step = self.progress, self.step
        step.model.train()
        frozen_to_eval(step.model, self.options.freeze)
        self.sampler.epoch = progress.epoch
        title = f"epoch {progress.epoch + 1}/{self.epochs}"
        lr = step.schedule.at(progress.epoch, progress.step).lr
        notes: set[str] = set()
        meter = Meter(f"{title}, lr {lr:.5f}", len(self.sampler), show=self.ranks.main)
        for number, batch in enumerate(meter.follow(self.loader)):
            if self.ranks.main and progress.epoch == 0 and number < PICTURED:
                save_batch(batch, self.train_set.names, self.folder / f"train_batch{number}.jpg")
            notes.update(batch.notes)
            self._tell(batch.notes)
            terms = step(batch, progress)
            report = step.weights.weigh(terms) | {k: terms[k] for k in ("matches", "overflow")}
            meter.add(report, len(batch.images))
            for callback in callbacks:
                callback.on_batch(batch, terms)
        for others in collect(sorted(notes), self.ranks):
            self._tell(others)
        row = merged(collect(meter.row(), self.ranks))
        return {"epoch": progress.epoch + 1, "lr": lr, **row, "skipped": progress.skipped}

    def _validate(self) -> Validation:
        """Evaluate the moving average; note whether it is the best."""
        progress = self.progress
        validation = self.validate(self.step.ema.model, self.val_set)
        skipped = validation.predictions.dataset.skipped[len(self.val_set.skipped) :]
        self._tell(f"left out of the evaluation: {line}" for line in skipped)
        progress.stats = validation.stats
        if self.options.image_weights:
            ap = np.array([max(row.ap, 0.0) for row in validation.evaluation.per_class])
            self.sampler.weights = image_weights(self.train_set, ap)
        if (value := fitness(progress.stats)) > progress.best:
            progress.best, progress.best_epoch = value, progress.epoch
            self.validated = validation
        return validation

    def _tell(self, lines: Iterable[str]) -> None:
        """Say what was not said before."""
        for line in lines:
            if line not in self.told:
                self.told.add(line)
                self.ranks.say(line)

    def _limit(self, started: float) -> str:
        """Note the time; why this epoch is the last, empty: it is not."""
        self.progress.seconds = share(perf_counter() - started, self.ranks)
        if self.progress.epoch >= self.epochs:
            return ALL_DONE
        hours = self.options.hours
        if hours is not None and self.progress.seconds >= hours * 3600:
            return f"{hours:g} hours have passed"
        return ""

    def _no_better(self) -> str:
        """Why an evaluation ends the run; empty: it does not, or nothing was ever found."""
        patience, progress = self.options.patience, self.progress
        if patience is None or progress.best <= 0:
            return ""
        if progress.epoch - progress.best_epoch >= patience:
            return f"no better model in {patience} epochs"
        return ""

    def _save(self) -> None:
        """Write weights and state; the state last, so that it never is ahead of the weights."""
        if not self.ranks.main:
            return
        progress, model = self.progress, self.step.ema.model
        about = {
            "epoch": progress.epoch,
            "stats": progress.stats,
            "training": asdict(self.options),
        }
        save_model(model, self.folder / "weights" / "last.safetensors", **about)
        if progress.best_epoch == progress.epoch > 0:
            save_model(model, self.folder / "weights" / "best.safetensors", **about)
        every = self.options.save_every
        if every is not None and progress.epoch % every == 0 < progress.epoch:
            save_model(model, self.folder / f"weights/epoch{progress.epoch}.safetensors", **about)
        save_state(self.folder, self._state())

    def _state(self) -> State:
        """All that the rest of the run depends on."""
        weights = self.sampler.weights
        return {
            **self.step.state_dict(),
            "progress": asdict(self.progress),
            "image_weights": None if weights is None else torch.from_numpy(weights),
            "options": asdict(self.options) | {"batch": self.step.schedule.batch, "resume": None},
            "hyper": asdict(self.hyper),
            "images": len(self.train_set.samples),
            "data": self.fingerprint,
        }

    def _restore(self, state: State) -> None:
        """Go on where a state was saved."""
        if state["images"] != len(self.train_set.samples):
            raise UserError(
                f"{self.folder} was trained on {state['images']} images, now there are "
                f"{len(self.train_set.samples)}: start a new run from its weights"
            )
        if state["data"] != self.fingerprint:
            self.ranks.say("warning: images or labels are not those that the run began with")
        self.step.load_state_dict(state)
        if (weights := state["image_weights"]) is not None:
            if weights.shape != (state["images"],) or not weights.isfinite().all():
                raise ValueError("image_weights")
            self.sampler.weights = weights.numpy()
        stats = state["progress"]["stats"]  # NaN among them: not evaluated
        self.progress = from_json(Progress, {**state["progress"], "stats": {}})
        self.progress.stats = {name: float(value) for name, value in stats.items()}
        was = state["options"]["epochs"] or EPOCHS
        if was != self.epochs > self.progress.epoch and self.progress.step:
            schedule, progress = self.step.schedule, self.progress
            self.ranks.say(schedule.compared_with(was, progress.epoch, progress.step))
