"""Batched non-maximum suppression in plain PyTorch; also what runs on a CPU."""

import torch
from torch import Tensor

CLASS_OFFSET = 4096.0


def nms_reference(
    prediction: Tensor,
    segment_counts: Tensor | None,
    classes: Tensor | None,
    frames: Tensor | None,
    conf: float,
    iou: float,
    multi_label: bool,
    agnostic: bool,
    max_det: int,
    max_candidates: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Suppress image by image; arguments and results as in `batched_nms`."""
    batch, rows, _ = prediction.shape
    boxes = prediction.new_zeros((batch, max_det, 6), dtype=torch.float32)
    counts = prediction.new_zeros(batch, dtype=torch.int32)
    overflow = prediction.new_zeros(batch, dtype=torch.int32)
    passing = prediction[:, :, 4].float() > conf
    if segment_counts is not None:
        place = torch.arange(rows, device=prediction.device).view(segment_counts.shape[1], -1)
        passing &= (place - place[:, :1] < segment_counts[:, :, None]).flatten(1)
    for image in range(batch):
        found = _candidates(prediction[image, passing[image]], conf, multi_label, classes)
        overflow[image] = max(len(found) - max_candidates, 0)
        order = found[:, 4].argsort(descending=True, stable=True)[:max_candidates]
        found = found[order]
        offset = 0.0 if agnostic else CLASS_OFFSET
        found = found[_suppress(found[:, :4] + found[:, 5:6] * offset, iou, max_det)]
        if frames is not None:
            pad, ratio, limit = frames[image]
            found[:, :4] = ((found[:, :4] - pad) / ratio).clamp_min(0).minimum(limit)
        boxes[image, : len(found)] = found
        counts[image] = len(found)
    return boxes, counts, overflow


def _candidates(rows: Tensor, conf: float, multi_label: bool, classes: Tensor | None) -> Tensor:
    """Candidates [n, 6] (x1, y1, x2, y2, score, class), in order, of rows that pass `conf`."""
    rows = rows.float()
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
