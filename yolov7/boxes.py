"""Functions on boxes, each named by the formats that it turns into one another.

Formats: ``xyxy`` is left, top, right, bottom; ``cxcywh`` is centre x, centre y, width, height. The
last dimension holds the four numbers; any leading dimensions and any unit will do.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from yolov7.letterbox import Geometry


def cxcywh_to_xyxy(boxes: Tensor) -> Tensor:
    """Corners of boxes [..., 4] given by centre and size."""
    centre, half = boxes[..., :2], boxes[..., 2:] / 2
    return torch.cat((centre - half, centre + half), dim=-1)


def xyxy_to_cxcywh(boxes: Tensor) -> Tensor:
    """Centre and size of boxes [..., 4] given by their corners."""
    top_left, bottom_right = boxes[..., :2], boxes[..., 2:]
    return torch.cat(((top_left + bottom_right) / 2, bottom_right - top_left), dim=-1)


def box_area(boxes: Tensor) -> Tensor:
    """Areas [...] of xyxy boxes [..., 4]."""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """Areas [N, M] that xyxy boxes a [N, 4] and b [M, 4] share."""
    top_left = torch.maximum(a[:, None, :2], b[:, :2])  # [N, M, 2]
    bottom_right = torch.minimum(a[:, None, 2:], b[:, 2:])  # [N, M, 2]
    return (bottom_right - top_left).clamp(min=0).prod(dim=-1)


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [N, M] of xyxy boxes a [N, 4] and b [M, 4]; 0 for two empty boxes."""
    overlap = intersection(a, b)
    union = box_area(a)[:, None] + box_area(b) - overlap
    return torch.where(union > 0, overlap / union, 0.0)


def clip_boxes(boxes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Xyxy boxes [..., 4] in pixels, cut at the border of an image of shape (height, width)."""
    height, width = shape
    limit = boxes.new_tensor((width, height, width, height))
    return boxes.clamp(min=0).minimum(limit)


def to_coco(
    rows: Tensor, image_id: int | str, category_ids: Sequence[int] | None = None
) -> list[dict[str, Any]]:
    """Detections of an image as rows of a COCO results file.

    Args:
        rows: [n, 6] x1, y1, x2, y2 in pixels, score, class.
        image_id: What the data set calls the image.
        category_ids: The data set's category by class number; None: the class number itself.

    Returns:
        image_id, category_id, bbox (left, top, width, height in pixels), score; of each row.
    """
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[int(label)] if category_ids is not None else int(label),
            "bbox": [x1, y1, x2 - x1, y2 - y1],
            "score": score,
        }
        for x1, y1, x2, y2, score, label in rows.tolist()
    ]


def frame_table(where: Sequence[Geometry]) -> Tensor:
    """What `in_frames` has to know of each frame's letterbox: fp32 [B, 3, 4] on the CPU."""
    rows = []
    for geometry in where:
        height, width = geometry.frame
        rows.append([geometry.pad * 2, geometry.ratio * 2, (width, height) * 2])
    return torch.tensor(rows, dtype=torch.float32)


def in_frames(boxes: Tensor, table: Tensor) -> Tensor:
    """Boxes of letterboxed images, in pixels of the frames that these were made from.

    Args:
        boxes: [B, n, 4] xyxy, pixels of the letterboxes.
        table: [B, 3, 4] from `frame_table`, on their device.

    Returns:
        [B, n, 4] xyxy, clipped to the frames.
    """
    pad, ratio, limit = table[:, None].unbind(2)  # [B, 1, 4] each
    return torch.minimum(((boxes - pad) / ratio).clamp_min(0), limit)
