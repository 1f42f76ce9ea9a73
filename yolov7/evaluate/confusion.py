"""Which class was taken for which."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from yolov7.boxes import box_area, box_iou, intersection
from yolov7.dataset import Sample

CONFIDENCE = 0.25
IOU = 0.5


def confusion_matrix(
    samples: Sequence[Sample], detections: Sequence[NDArray[np.float32]], classes: int
) -> NDArray[np.int64]:
    """Count predicted against true classes.

    Detections of at least `CONFIDENCE` and boxes are paired whatever their classes, the largest
    overlap first, from `IOU` on. Detections that lie by half or more in a crowd count nowhere.

    Args:
        samples: Labelled images.
        detections: For every sample [n, 6]: x1, y1, x2, y2 in pixels, score, class.
        classes: Number of classes, nc.

    Returns:
        [nc + 1, nc + 1], predicted class by true class; the last row counts missed boxes, the
        last column detections of background.
    """
    matrix = np.zeros((classes + 1, classes + 1), np.int64)
    for sample, found in zip(samples, detections, strict=True):
        found = found[found[:, 4] >= CONFIDENCE]
        labels = sample.labels
        boxes, crowds = labels.boxes[~labels.crowd], labels.boxes[labels.crowd]
        truth = labels.classes[~labels.crowd]
        predicted = found[:, 5].astype(np.int64)
        rows, columns = _pair(found[:, :4], boxes)
        np.add.at(matrix, (predicted[rows], truth[columns]), 1)
        matrix[classes] += np.bincount(np.delete(truth, columns), minlength=classes + 1)
        background = ~_inside(found[:, :4], crowds)
        background[rows] = False
        matrix[:, classes] += np.bincount(predicted[background], minlength=classes + 1)
    return matrix


def _pair(
    found: NDArray[np.float32], boxes: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows of `found` and of `boxes` that belong together, each at most once."""
    overlap = box_iou(torch.from_numpy(found), torch.from_numpy(boxes)).numpy()
    pairs = np.argwhere(overlap >= IOU)
    pairs = pairs[np.argsort(-overlap[pairs[:, 0], pairs[:, 1]], kind="stable")]
    partner: dict[int, int] = {}
    for row, column in pairs.tolist():
        if row not in partner and column not in partner.values():
            partner[row] = column
    return np.array(list(partner), np.int64), np.array(list(partner.values()), np.int64)


def _inside(found: NDArray[np.float32], crowds: NDArray[np.float32]) -> NDArray[np.bool_]:
    """[n] whether half of a detection's area or more lies in one of the crowds."""
    boxes = torch.from_numpy(found)
    area = box_area(boxes)
    shared = intersection(boxes, torch.from_numpy(crowds))
    return ((shared >= 0.5 * area[:, None]).any(1) & (area > 0)).numpy()
