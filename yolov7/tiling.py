"""Cutting a large image into overlapping tiles, for objects too small to survive its scaling."""

import torch
from torch import Tensor

from yolov7.boxes import cxcywh_to_xyxy, unletterbox, xyxy_to_cxcywh

Tile = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the image

COVERED = 0.7  # share of a cut box that a whole one has to hold
EDGE = 0.01  # share of a tile's width within which a box ends at its edge


def tile_grid(shape: tuple[int, int], tile: int, overlap: float) -> list[Tile]:
    """Tiles that cover an image, row by row, as far apart as the overlap allows.

    Args:
        shape: (height, width) of the image in pixels.
        tile: Side of a tile in pixels; an image smaller than that gives smaller tiles.
        overlap: Least share of a tile's side that its neighbour covers too, 0 <= overlap < 1.

    Returns:
        Tiles of equal size that end at the image's border.
    """
    height, width = shape
    return [
        (left, top, min(left + tile, width), min(top + tile, height))
        for top in _starts(height, tile, overlap)
        for left in _starts(width, tile, overlap)
    ]


def _starts(side: int, tile: int, overlap: float) -> list[int]:
    """Where tiles start along one side, spread evenly."""
    if side <= tile:
        return [0]
    step = max(int(tile * (1 - overlap)), 1)
    gaps = -(-(side - tile) // step)
    return [(side - tile) * index // gaps for index in range(gaps + 1)]


def to_image(
    rows: Tensor, tile: Tile, ratio: tuple[float, float], pad: tuple[float, float]
) -> Tensor:
    """Decoded rows [n, 5 + classes] of a letterboxed tile in pixels of the image, cut at the tile.

    Args:
        rows: Centre x, y, width, height in pixels of the letterbox; the rest is passed on.
        tile: Where it lies.
        ratio: Scale (x, y) of its letterbox.
        pad: Grey (x, y) of its letterbox.
    """
    left, top, right, bottom = tile
    boxes = unletterbox(cxcywh_to_xyxy(rows[:, :4]), ratio, pad, (bottom - top, right - left))
    boxes = xyxy_to_cxcywh(boxes + boxes.new_tensor((left, top, left, top)))
    return torch.cat((boxes, rows[:, 4:]), 1)


def drop_cut_boxes(
    detections: Tensor, tiles: list[Tile], shape: tuple[int, int], scale: float
) -> Tensor:
    """Leave out the pieces of objects that a tile's edge cuts and another view shows whole.

    NMS does not find these: a piece and the whole overlap too little. A box is a piece if it ends
    at an edge of a tile inside the image, and is covered if most of it lies in a box of its class
    that is none.

    Args:
        detections: [n, 6] x1, y1, x2, y2, score, class; coordinates are ``scale`` times pixels.
        tiles: Of the image, in pixels.
        shape: (height, width) of the image in pixels.
        scale: From pixels to the coordinates of the detections.

    Returns:
        [k, 6], k <= n, in the same order.
    """
    boxes, label = detections[:, :4], detections[:, 5]
    height, width = shape
    lines_x = {x for tile in tiles for x in (tile[0], tile[2])} - {0, width}
    lines_y = {y for tile in tiles for y in (tile[1], tile[3])} - {0, height}
    near = EDGE * scale * max(tile[2] - tile[0] for tile in tiles)
    piece = _ends_at(boxes[:, 0::2], lines_x, scale, near)
    piece |= _ends_at(boxes[:, 1::2], lines_y, scale, near)
    top_left = torch.maximum(boxes[:, None, :2], boxes[:, :2])
    bottom_right = torch.minimum(boxes[:, None, 2:], boxes[:, 2:])
    shared = (bottom_right - top_left).clamp(min=0).prod(-1)  # [n, n]
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    held = (shared > COVERED * area[:, None]) & (label[:, None] == label) & ~piece
    return detections[~(piece & held.any(1))]


def _ends_at(ends: Tensor, lines: set[int], scale: float, near: float) -> Tensor:
    """Which boxes, by their two ends [n, 2] along an axis, end near one of the lines: [n] bool."""
    at = ends.new_tensor(sorted(lines)) * scale
    return ((ends[:, :, None] - at).abs() < near).any(-1).any(-1)
