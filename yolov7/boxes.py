"""Functions on boxes, each named by the formats that it turns into one another.

Formats: ``xyxy`` is left, top, right, bottom; ``cxcywh`` is centre x, centre y, width, height. The
last dimension holds the four numbers; any leading dimensions and any unit will do.
"""

import torch
from torch import Tensor


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


def box_iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union [N, M] of xyxy boxes a [N, 4] and b [M, 4]; 0 for two empty boxes."""
    top_left = torch.maximum(a[:, None, :2], b[:, :2])  # [N, M, 2]
    bottom_right = torch.minimum(a[:, None, 2:], b[:, 2:])  # [N, M, 2]
    overlap = (bottom_right - top_left).clamp(min=0).prod(dim=-1)  # [N, M]
    union = box_area(a)[:, None] + box_area(b) - overlap
    return torch.where(union > 0, overlap / union, 0.0)


def clip_boxes(boxes: Tensor, shape: tuple[int, int]) -> Tensor:
    """Xyxy boxes [..., 4] in pixels, cut at the border of an image of shape (height, width)."""
    height, width = shape
    limit = boxes.new_tensor((width, height, width, height))
    return boxes.clamp(min=0).minimum(limit)


def unletterbox(
    boxes: Tensor, ratio: tuple[float, float], pad: tuple[float, float], shape: tuple[int, int]
) -> Tensor:
    """Boxes of a letterboxed image, in pixels of the image that it was made from.

    Args:
        boxes: [..., 4] xyxy, pixels of the letterboxed image.
        ratio: Scale (x, y) that the letterbox applied.
        pad: Grey pixels (left, top) before rounding, as ``letterbox`` returns them.
        shape: (height, width) of the source image.

    Returns:
        [..., 4] xyxy, clipped to the source image.
    """
    offset = boxes.new_tensor((*pad, *pad))
    scale = boxes.new_tensor((*ratio, *ratio))
    return clip_boxes((boxes - offset) / scale, shape)
