"""Evaluation while training: the evaluator of `val`, shared among the ranks."""

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch

from yolov7.dataset import Dataset
from yolov7.engine.choose import Runtime, open_network
from yolov7.evaluate import Evaluation, Predictions, Settings, measure, predict
from yolov7.evaluate.run import GROUP
from yolov7.model import YOLOv7
from yolov7.train.config import UNCHANGED
from yolov7.train.data import TrainingData
from yolov7.train.distributed import Ranks, collect, synchronise
from yolov7.train.loader import Batch, Loader
from yolov7.train.loss import Loss, LossWeights, head_loss
from yolov7.train.meter import LOSSES, Meter, merged
from yolov7.train.precision import autocast
from yolov7.train.sampler import EpochSampler, rectangles

FITNESS = {"AP50": 0.1, "AP": 0.9}


class Validation(NamedTuple):
    """An evaluation, and the detections that it is about."""

    evaluation: Evaluation
    predictions: Predictions


def fitness(stats: dict[str, float]) -> float:
    """What the best epoch is chosen by."""
    return sum(weight * max(stats[name], 0.0) for name, weight in FITNESS.items())


class ValidationLoss:
    """The plain loss on unchanged images: next to the training loss it shows overfitting.

    Args:
        loss: the plain one, of the lead head.
        weights: of its terms.
        loader: batches of this rank.
        dtype: what the network computes in, as in training.
    """

    def __init__(
        self, loss: Loss, weights: LossWeights, loader: Iterable[Batch], dtype: torch.dtype
    ) -> None:
        self.loss, self.weights, self.loader, self.dtype = loss, weights, loader, dtype

    @torch.no_grad()
    def __call__(self, model: YOLOv7, device: torch.device, ranks: Ranks) -> dict[str, float]:
        """Means over the batches of all ranks: `val_box`, `val_objectness`, `val_classes`."""
        model.eval()
        meter = Meter("validation loss", 0, show=False)
        for batch in meter.follow(self.loader):
            images = batch.images.to(device, non_blocking=True).float().div_(255)
            with autocast(device, self.dtype):
                lead = model.lead_outputs(images.contiguous(memory_format=torch.channels_last))
            meter.add(self.weights.weigh(self.loss(lead, batch.labels)), len(images))
        row = merged(collect(meter.row(), ranks))
        return {f"val_{name}": row[name] for name in LOSSES}


def validation_loss(
    model: YOLOv7,
    dataset: Dataset,
    batch: int,
    weights: LossWeights,
    dtype: torch.dtype,
    ranks: Ranks,
    workers: int | None,
) -> ValidationLoss:
    """The loss of a model's lead head on images as they are, each rank's share of them.

    Args:
        model: gives the head, and the side of the images.
        dataset: the images.
        batch: of a rank.
        weights: of the terms.
        dtype: what the network computes in.
        ranks: which process this is.
        workers: see `Loader`.
    """
    samples = dataset.samples
    sampler = EpochSampler(
        len(samples),
        max(1, min(batch, len(samples))),
        model.imgsz,
        rank=ranks.rank,
        world=ranks.world,
        shapes=rectangles(samples, model.imgsz, model.stride),
    )
    pin = model.head.anchors.is_cuda
    data = TrainingData(dataset, model.imgsz, UNCHANGED)
    loader = Loader(data, sampler, workers=workers, pin=pin, keep=False)
    return ValidationLoss(head_loss(model, plain=True, lead_only=True), weights, loader, dtype)


def validate(
    model: YOLOv7,
    dataset: Dataset,
    settings: Settings,
    device: torch.device,
    ranks: Ranks,
    engine: str = "eager",
) -> Validation:
    """Evaluate a model, which stays as it is, by an engine; every rank gets the result.

    Images share canvases in groups of like aspect: each rank takes whole groups, so that the
    result does not depend on the number of ranks.
    """
    synchronise(model, ranks)
    samples = dataset.samples
    order = sorted(range(len(samples)), key=lambda i: samples[i].height / samples[i].width)
    groups = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]
    mine = sorted(index for group in groups[ranks.rank :: ranks.world] for index in group)
    found, unread = {}, list[str]()
    speed: dict[str, float] = {}
    if mine:
        network = open_network(Runtime(weights=model, device=device, engine=engine))
        part = replace(dataset, samples=[samples[i] for i in mine])
        result = predict(network, part, settings)
        places = {id(samples[i]): i for i in mine}
        read = (places[id(sample)] for sample in result.dataset.samples)
        found = dict(zip(read, result.detections, strict=True))
        unread = result.dataset.skipped[len(dataset.skipped) :]
        speed = result.speed
    parts = collect((found, unread), ranks)
    merged = {i: boxes for found, _ in parts for i, boxes in found.items()}
    skipped = [*dataset.skipped, *(line for _, unread in parts for line in unread)]
    seen = sorted(merged)
    whole = replace(dataset, samples=[samples[i] for i in seen], skipped=skipped)
    predictions = Predictions(whole, [merged[i] for i in seen], speed)
    return Validation(measure(whole, predictions.detections, speed), predictions)
