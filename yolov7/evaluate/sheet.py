"""A sheet of images with their labels and, beside each, what was found."""

from collections.abc import Sequence

import numpy as np

from yolov7.dataset import Sample
from yolov7.drawing import draw_boxes
from yolov7.errors import UserError
from yolov7.evaluate.coco import Detections
from yolov7.images import read_image
from yolov7.letterbox import Image, letterbox, letterbox_geometry

PAIRS = 8
COLUMNS = 2  # pairs beside each other
CELL = 400  # pixels, each side
CONFIDENCE = 0.25


def draw_sheet(
    samples: Sequence[Sample], detections: Sequence[Detections], names: Sequence[str]
) -> Image:
    """Up to eight images, spread over the data set, each twice: labels left, detections right.

    Args:
        samples: Labelled images, at least one.
        detections: For every sample [n, 6]; those of at least `CONFIDENCE` are drawn.
        names: Of the classes.

    Returns:
        [H, W, 3] uint8 BGR.
    """
    count = min(PAIRS, len(samples))
    pairs = []
    for position in np.linspace(0, len(samples) - 1, count).round().astype(int).tolist():
        sample, found = samples[position], detections[position]
        try:
            image = read_image(sample.path)
        except UserError:  # gone meanwhile
            continue
        sure = found[found[:, 4] >= CONFIDENCE]
        labels = [names[label] for label in sample.labels.classes]
        texts = [f"{names[int(label)]} {score:.2f}" for *_, score, label in sure]
        truth = draw_boxes(image, sample.labels.boxes, labels, sample.labels.classes.tolist())
        said = draw_boxes(image, sure[:, :4], texts, sure[:, 5].astype(int).tolist())
        pairs.append(np.concatenate([_in_cell(one) for one in (truth, said)], 1))
    blank = np.full((CELL, 2 * CELL, 3), 255, np.uint8)
    pairs += [blank] * (-len(pairs) % COLUMNS)
    rows = [np.concatenate(pairs[i : i + COLUMNS], 1) for i in range(0, len(pairs), COLUMNS)]
    return np.concatenate(rows) if rows else blank


def _in_cell(image: Image) -> Image:
    return letterbox(image, letterbox_geometry((image.shape[0], image.shape[1]), CELL))
