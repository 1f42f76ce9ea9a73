"""Evaluation while training: the evaluator of `val`, shared among the ranks."""

import copy
from dataclasses import replace
from typing import NamedTuple

import torch

from yolov7.dataset import Dataset
from yolov7.evaluate import Evaluation, Predictions, Settings, measure, predict
from yolov7.evaluate.run import GROUP
from yolov7.model import YOLOv7
from yolov7.network import Network
from yolov7.train.distributed import Ranks, collect, synchronise

FITNESS = {"AP50": 0.1, "AP": 0.9}


class Validation(NamedTuple):
    """An evaluation, and the detections that it is about."""

    evaluation: Evaluation
    predictions: Predictions


def fitness(stats: dict[str, float]) -> float:
    """What the best epoch is chosen by."""
    return sum(weight * max(stats[name], 0.0) for name, weight in FITNESS.items())


def validate(
    model: YOLOv7, dataset: Dataset, settings: Settings, device: torch.device, ranks: Ranks
) -> Validation:
    """Evaluate a model, which stays as it is; every rank gets the result.

    Images share canvases in groups of like aspect: each rank takes whole groups, so that the
    result does not depend on the number of ranks.
    """
    synchronise(model, ranks)
    samples = dataset.samples
    order = sorted(range(len(samples)), key=lambda i: samples[i].height / samples[i].width)
    groups = [order[start : start + GROUP] for start in range(0, len(order), GROUP)]
    mine = sorted(index for group in groups[ranks.rank :: ranks.world] for index in group)
    found = {}
    speed: dict[str, float] = {}
    if mine:
        network = Network(copy.deepcopy(model), device=device)
        part = replace(dataset, samples=[samples[i] for i in mine])
        result = predict(network, part, settings, device=network.device, dtype=network.dtype)
        places = {id(samples[i]): i for i in mine}
        read = (places[id(sample)] for sample in result.dataset.samples)
        found = dict(zip(read, result.detections, strict=True))
        speed = result.speed
    merged = {i: boxes for part in collect(found, ranks) for i, boxes in part.items()}
    seen = sorted(merged)
    whole = replace(dataset, samples=[samples[i] for i in seen])
    predictions = Predictions(whole, [merged[i] for i in seen], speed)
    return Validation(measure(whole, predictions.detections, speed), predictions)
