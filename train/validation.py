"""Evaluation while training: the evaluator of `val`, shared among the ranks, and the loss.

Both come from one pass: every image is read once and goes through the network once. Ranks share
the images, and then the classes whose detections are matched.
"""

from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from yolov7.dataset import Dataset, Problem, Sample
from yolov7.engine.choose import Runtime, open_network
from yolov7.evaluate import Evaluation, Predictions, Settings, measure, predict
from yolov7.evaluate.coco import Matching, match, shares
from yolov7.evaluate.run import GROUP, by_aspect
from yolov7.letterbox import Geometry
from yolov7.model import YOLOv7
from yolov7.train.assigner import Anchors, pad_labels
from yolov7.train.distributed import Ranks, collect, synchronise
from yolov7.train.loss import LossWeights, head_loss

FITNESS = {"AP50": 0.1, "AP": 0.9}
LEAST = 1e-7  # of a probability, and of what it lacks of 1: beyond it fp32 knows none


class Validation(NamedTuple):
    """An evaluation, the detections that it is about, and the loss on the same images.

    The losses are means over the images: `val_box`, `val_objectness`, `val_classes`.
    """

    evaluation: Evaluation
    predictions: Predictions
    losses: dict[str, float]

    @property
    def stats(self) -> dict[str, float]:
        """All figures by name."""
        return {name: float(value) for name, value in self.evaluation.stats.items()} | self.losses


def fitness(stats: dict[str, float]) -> float:
    """What the best epoch is chosen by."""
    return sum(weight * max(stats[name], 0.0) for name, weight in FITNESS.items())


class ValidationLoss:
    """The plain loss on unchanged images: next to the training loss it shows overfitting.

    It is called with every batch of an evaluation, see `yolov7.evaluate.predict`.

    Args:
        model: gives the head, whose lead outputs it is the loss of.
        weights: of the terms.
    """

    def __init__(self, model: YOLOv7, weights: LossWeights) -> None:
        self.loss, self.weights = head_loss(model, plain=True, lead_only=True), weights
        self.sums: dict[str, Tensor] = {}
        self.images = 0

    @torch.no_grad()
    def __call__(self, samples: list[Sample], decoded: Tensor, where: list[Geometry]) -> None:
        """Take in a batch."""
        raw = undecoded(decoded, self.loss.anchors, where[0].shape)
        labels = [letterboxed(one, place) for one, place in zip(samples, where, strict=True)]
        for name, term in self.weights.weigh(self.loss(raw, pad_labels(labels))).items():
            self.sums[name] = self.sums.get(name, 0) + term * len(samples)
        self.images += len(samples)


def undecoded(decoded: Tensor, anchors: Anchors, shape: tuple[int, int]) -> list[Tensor]:
    """The raw outputs of the levels that `Detect.decode` made boxes of.

    Args:
        decoded: `[B, N, 5 + nc]` centre, size, objectness, class probabilities.
        anchors: the head's geometry.
        shape: height and width of the images in pixels.

    Returns:
        `[B, na, ny, nx, 5 + nc]` of each level, in fp32, between -16 and 16.
    """
    sizes = anchors.on(decoded.device)
    grids = [(shape[0] // stride, shape[1] // stride) for stride in anchors.strides]
    rows = decoded.float().split([sizes.shape[1] * ny * nx for ny, nx in grids], 1)
    raw = []
    for level, part in enumerate(rows):
        (ny, nx), stride = grids[level], anchors.strides[level]
        s = part.reshape(len(part), -1, ny, nx, part.shape[2]).clone()
        s[..., 0] = (s[..., 0] / stride + 0.5 - torch.arange(nx, device=s.device)) / 2
        s[..., 1] = (s[..., 1] / stride + 0.5 - torch.arange(ny, device=s.device)[:, None]) / 2
        s[..., 2:4] = (s[..., 2:4] / sizes[level][:, None, None]).sqrt() / 2
        raw.append(s.logit_(LEAST))
    return raw


def letterboxed(sample: Sample, where: Geometry) -> Tensor:
    """Labels `[n, 5]` of an image in its letterbox, as fractions of it, crowds left out."""
    counted = ~sample.labels.crowd
    frame = np.tile([sample.width, sample.height], 2)
    corners = sample.labels.boxes[counted].clip(0, frame) * np.tile(where.ratio, 2)
    low, high = corners[:, :2] + where.pad, corners[:, 2:] + where.pad
    boxes = np.concatenate([(low + high) / 2, high - low], 1) / np.tile(where.shape[::-1], 2)
    classes = sample.labels.classes[counted]
    labels = np.concatenate([classes[:, None], boxes], 1)[(high > low).all(1)]
    return torch.from_numpy(labels.astype(np.float32))


def validate(
    model: YOLOv7,
    dataset: Dataset,
    settings: Settings,
    weights: LossWeights,
    device: torch.device,
    ranks: Ranks,
    engine: str = "eager",
) -> Validation:
    """Evaluate a model, which stays as it is, by an engine; every rank gets the result.

    Images share canvases in groups of like aspect: each rank takes whole groups, so that the
    result does not depend on the number of ranks (nor do the losses, means over the matches of a
    batch, where a group is whole batches).
    """
    synchronise(model, ranks)
    samples = dataset.samples
    order = by_aspect(samples)
    groups = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]
    mine = sorted(index for group in groups[ranks.rank :: ranks.world] for index in group)
    found, unread = {}, list[Problem]()
    speed: dict[str, float] = {}
    loss = ValidationLoss(model, weights)
    if mine:
        network = open_network(Runtime(weights=model, device=device, engine=engine))
        part = replace(dataset, samples=[samples[i] for i in mine])
        result = predict(network, part, settings, loss)
        places = {id(samples[i]): i for i in mine}
        read = (places[id(sample)] for sample in result.dataset.samples)
        found = dict(zip(read, result.detections, strict=True))
        unread = result.dataset.skipped[len(dataset.skipped) :]
        speed = result.speed
    sums = {name: float(value) for name, value in loss.sums.items()}  # synchronises
    parts = collect((found, unread, sums, loss.images), ranks)
    merged = {i: boxes for found, *_ in parts for i, boxes in found.items()}
    skipped = [*dataset.skipped, *(one for _, unread, *_ in parts for one in unread)]
    seen = sorted(merged)
    whole = replace(dataset, samples=[samples[i] for i in seen], skipped=skipped)
    predictions = Predictions(whole, [merged[i] for i in seen], speed)
    classes = shares(predictions.detections, len(dataset.names), ranks.world)
    own = classes[ranks.rank : ranks.rank + 1]  # none, where there are more ranks than classes
    matched = collect([match(whole, predictions.detections, some) for some in own], ranks)
    matching = Matching.joined(list(chain.from_iterable(matched)), classes)
    evaluation = measure(whole, predictions.detections, speed, matching)
    return Validation(evaluation, predictions, _means([part[2:] for part in parts]))


def _means(parts: Sequence[tuple[dict[str, float], int]]) -> dict[str, float]:
    """Means over the images of all ranks, of sums and numbers of images of each."""
    images = sum(count for _, count in parts)
    names = next(sums for sums, count in parts if count)
    return {f"val_{n}": sum(sums.get(n, 0.0) for sums, _ in parts) / images for n in names}
