"""Anchors that fit a data set: how well the present ones do, and better ones."""

import numpy as np
import torch
from numpy.typing import NDArray

from yolov7.dataset import Dataset, Sample
from yolov7.model import YOLOv7
from yolov7.train.assigner import RATIO_LIMIT
from yolov7.train.distributed import Ranks, share

ENOUGH = 0.98  # best possible recall with which anchors are kept
GENERATIONS = 1000
ROUNDS = 30  # of k-means
FITTED = 20_000  # boxes that are fitted to; of 200 000, a generation takes 0.19 s
MIN_SIDE = 2.0  # pixels; smaller boxes say nothing about anchors

Sizes = NDArray[np.float64]


def box_sizes(samples: list[Sample], size: int) -> Sizes:
    """Width and height `[n, 2]` of all boxes in images whose longer side is `size` pixels."""
    parts = [np.zeros((0, 2))]
    for sample in samples:
        boxes = sample.labels.boxes[~sample.labels.crowd].astype(np.float64)
        ratio = size / max(sample.height, sample.width)
        parts.append((boxes[:, 2:] - boxes[:, :2]) * ratio)
    sizes = np.concatenate(parts)
    return sizes[(sizes >= MIN_SIDE).all(1)]


def _closeness(boxes: Sizes, anchors: Sizes) -> NDArray[np.float64]:
    """Of every box to its best anchor `[n]`: 1 for equal shapes, 1 / 4 at the limit."""
    ratio = boxes[:, None] / anchors[None]
    return np.asarray(np.minimum(ratio, 1 / ratio).min(2).max(1))


def possible_recall(boxes: Sizes, anchors: Sizes) -> float:
    """Share of the boxes `[n, 2]` that have an anchor `[k, 2]` within the ratio limit."""
    return float((_closeness(boxes, anchors) > 1 / RATIO_LIMIT).mean())


def _fitness(boxes: Sizes, anchors: Sizes) -> float:
    """Mean closeness, counting only boxes within the limit."""
    closeness = _closeness(boxes, anchors)
    return float((closeness * (closeness > 1 / RATIO_LIMIT)).mean())


def fit_anchors(boxes: Sizes, count: int, seed: int = 0) -> Sizes:
    """K-means on the boxes' sizes, then a genetic refinement of `_fitness`.

    Args:
        boxes: `[n, 2]` pixels, at least `count` of them; of many, a sample is taken.
        count: number of anchors.
        seed: of the sample and the search.

    Returns:
        `[count, 2]` pixels, by area.
    """
    rng = np.random.default_rng(seed)
    if len(boxes) > FITTED:
        boxes = rng.choice(boxes, FITTED, replace=False)
    scale = boxes.std(0) + 1e-9
    points = boxes / scale
    centres = points[rng.choice(len(points), count, replace=False)]
    for _ in range(ROUNDS):
        nearest = np.square(points[:, None] - centres).sum(2).argmin(1)
        for k in np.unique(nearest):
            centres[k] = points[nearest == k].mean(0)
    best = centres * scale
    fitness = _fitness(boxes, best)
    for _ in range(GENERATIONS):
        change = np.where(rng.random(best.shape) < 0.9, rng.normal(0, 0.1, best.shape), 0)
        mutant = np.maximum(best * np.clip(1 + rng.random() * change, 0.3, 3.0), MIN_SIDE)
        if (score := _fitness(boxes, mutant)) > fitness:
            best, fitness = mutant, score
    return best[best.prod(1).argsort()]


def better_anchors(
    boxes: Sizes, anchors: NDArray[np.float32], seed: int = 0
) -> tuple[float, NDArray[np.float32] | None]:
    """Judge anchors and fit others where fewer than 98 % of the boxes match one.

    Args:
        boxes: `[n, 2]` pixels, n > 0; fewer than there are anchors are not enough to fit to.
        anchors: `[nl, na, 2]` pixels.
        seed: of the search.

    Returns:
        The best possible recall of the present anchors, and better ones or None.
    """
    flat = anchors.reshape(-1, 2).astype(np.float64)
    recall = possible_recall(boxes, flat)
    if recall >= ENOUGH or len(boxes) < len(flat):
        return recall, None
    fitted = fit_anchors(boxes, len(flat), seed)
    if _fitness(boxes, fitted) <= _fitness(boxes, flat):
        return recall, None
    return recall, fitted.reshape(anchors.shape).astype(np.float32)


def fit_model_anchors(model: YOLOv7, dataset: Dataset, size: int, seed: int, ranks: Ranks) -> str:
    """Give a model anchors that fit the data, where its own do not; say what was done.

    The main process alone searches, seconds of work; the others get what it found.
    """
    found = _search(model, dataset, size, seed) if ranks.main else ("", None)
    note, better = share(found, ranks)
    if better is not None:
        model.head.anchors.copy_(torch.from_numpy(better))
    return note


def _search(
    model: YOLOv7, dataset: Dataset, size: int, seed: int
) -> tuple[str, NDArray[np.float32] | None]:
    """What is to be said about a model's anchors, and better ones or None."""
    boxes = box_sizes(dataset.samples, size)
    if not len(boxes):
        return f"no box has {MIN_SIDE:g} pixels a side: the anchors stay", None
    recall, better = better_anchors(boxes, model.head.anchors.numpy(), seed)
    note = f"{recall:.1%} of the boxes match an anchor"
    if better is None:
        return note, None
    after = possible_recall(boxes, better.reshape(-1, 2).astype(np.float64))
    return f"{note}: new anchors were fitted, which {after:.1%} match", better
