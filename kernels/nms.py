"""Batched non-maximum suppression.

A row of the prediction `[B, N, 5 + nc]` (centre x, centre y, width, height in pixels, objectness,
class probabilities) gives at most one candidate, its best class, or with `multi_label` one per
class. A candidate needs objectness > conf and score = objectness x class > conf, and its four
corners must be finite; NaN never passes. With one class the score is the objectness alone.

The best `max_candidates` of an image, by score and then by row x nc + class, are walked in that
order: one is kept unless its IoU with a kept one exceeds `iou`. Boxes of different classes are kept
apart by an offset of 4096 px per class, added in fp32, in which everything here is computed.
"""

from typing import NamedTuple

import torch
from torch import Tensor

CLASS_OFFSET = 4096.0


class Detections(NamedTuple):
    """What is left of a batch after suppression, highest score first.

    Attributes:
        boxes: [B, max_det, 6] fp32: x1, y1, x2, y2 in pixels, score, class; zero beyond the count.
        counts: [B] int32, boxes kept per image.
        overflow: [B] int32, candidates beyond `max_candidates`, which were not looked at.
    """

    boxes: Tensor
    counts: Tensor
    overflow: Tensor


def nms_reference(
    prediction: Tensor,
    conf: float,
    iou: float,
    multi_label: bool,
    agnostic: bool,
    classes: Tensor | None,
    max_det: int,
    max_candidates: int,
) -> Detections:
    """Suppress image by image in plain PyTorch; arguments as in `batched_nms`."""
    batch = prediction.shape[0]
    boxes = prediction.new_zeros((batch, max_det, 6), dtype=torch.float32)
    counts = prediction.new_zeros(batch, dtype=torch.int32)
    overflow = prediction.new_zeros(batch, dtype=torch.int32)
    for image in range(batch):
        found = _candidates(prediction[image], conf, multi_label, classes)  # [n, 6]
        overflow[image] = max(len(found) - max_candidates, 0)
        order = found[:, 4].argsort(descending=True, stable=True)[:max_candidates]
        found = found[order]
        offset = 0.0 if agnostic else CLASS_OFFSET
        kept = _suppress(found[:, :4] + found[:, 5:6] * offset, iou, max_det)
        boxes[image, : len(kept)] = found[kept]
        counts[image] = len(kept)
    return Detections(boxes, counts, overflow)


def _candidates(rows: Tensor, conf: float, multi_label: bool, classes: Tensor | None) -> Tensor:
    """The candidates [n, 6] (x1, y1, x2, y2, score, class) of one image, in (row, class) order."""
    rows = rows[rows[:, 4] > conf].float()
    centre, half = rows[:, :2], rows[:, 2:4] / 2
    corners = torch.cat((centre - half, centre + half), 1)
    finite = corners.isfinite().all(1)
    corners, rows = corners[finite], rows[finite]
    objectness = rows[:, 4:5]
    scores = objectness if rows.shape[1] == 6 else rows[:, 5:] * objectness
    if multi_label:
        row, label = (scores > conf).nonzero(as_tuple=True)
    else:
        best, label = scores.masked_fill(scores.isnan(), -1.0).max(1)
        row = (best > conf).nonzero().squeeze(1)
        label = label[row]
    if classes is not None:
        wanted = torch.isin(label, classes)
        row, label = row[wanted], label[wanted]
    return torch.cat((corners[row], scores[row, label, None], label[:, None].float()), 1)


def _suppress(boxes: Tensor, iou: float, max_det: int) -> Tensor:
    """Indices of the boxes [n, 4] that are kept, best first, at most `max_det`.

    A block of boxes is compared with all kept ones and with itself at once, so that the work is
    bounded by (boxes looked at) x (max_det + block), and ends with the last box that is needed.
    """
    block = 256
    kept = torch.empty(0, dtype=torch.int64, device=boxes.device)
    for start in range(0, len(boxes), block):
        if len(kept) >= max_det:
            break
        current = torch.arange(start, min(start + block, len(boxes)), device=boxes.device)
        current = current[~(_iou(boxes[kept], boxes[current]) > iou).any(0)]
        overlaps = (_iou(boxes[current], boxes[current]) > iou).tolist()
        chosen: list[int] = []
        for index, overlap in enumerate(overlaps):
            if not any(overlap[better] for better in chosen):
                chosen.append(index)
        kept = torch.cat((kept, current[chosen]))
    return kept[:max_det]


def _iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union of boxes [N, 4] and [M, 4] (corners) as [N, M]; NaN for 0 / 0."""
    area_a = (a[:, 2] - a[:, 0]) * (a[:, 3] - a[:, 1])
    area_b = (b[:, 2] - b[:, 0]) * (b[:, 3] - b[:, 1])
    width = (torch.minimum(a[:, None, 2], b[:, 2]) - torch.maximum(a[:, None, 0], b[:, 0])).clamp(0)
    height = (torch.minimum(a[:, None, 3], b[:, 3]) - torch.maximum(a[:, None, 1], b[:, 1])).clamp(
        0
    )
    shared = width * height
    return shared / (area_a[:, None] + area_b - shared)


def batched_nms(
    prediction: Tensor,
    *,
    conf: float = 0.25,
    iou: float = 0.45,
    multi_label: bool = False,
    agnostic: bool = False,
    classes: Tensor | None = None,
    max_det: int = 300,
    max_candidates: int = 30000,
) -> Detections:
    """Keep the best boxes of every image of a batch.

    Args:
        prediction: [B, N, 5 + nc] fp32, fp16 or bf16, decoded: centre x, centre y, width, height in
            pixels, objectness, class probabilities.
        conf: what objectness and score must exceed, in 0..1.
        iou: the IoU with a better box above which a box is dropped, in 0..1.
        multi_label: every class of a row may be a box, not only its best; without effect if nc = 1.
        agnostic: boxes of different classes suppress each other too.
        classes: class ids [k] (integers) to keep; all if None.
        max_det: boxes kept per image.
        max_candidates: candidates per image that are looked at, the best ones; more are counted.

    Returns:
        The boxes, highest score first, equal scores in the order of row and class.

    Raises:
        ValueError: wrong rank, dtype, width or limits.
    """
    if prediction.ndim != 3 or prediction.shape[2] < 6:
        raise ValueError(f"prediction must be [B, N, 5 + nc], got {list(prediction.shape)}")
    if prediction.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"prediction must be fp32, fp16 or bf16, got {prediction.dtype}")
    if not (0 <= conf <= 1 and 0 <= iou <= 1):
        raise ValueError(f"conf and iou must lie in 0..1, got {conf} and {iou}")
    if max_det < 1 or max_candidates < 1:
        raise ValueError(f"limits must be at least 1, got {max_det=} and {max_candidates=}")
    if classes is not None and (
        classes.ndim != 1 or classes.dtype not in (torch.int32, torch.int64)
    ):
        raise ValueError(f"classes must be integers [k], got {list(classes.shape)} {classes.dtype}")
    multi_label = multi_label and prediction.shape[2] > 6
    return nms_reference(
        prediction, conf, iou, multi_label, agnostic, classes, max_det, max_candidates
    )
