"""Cutting a large image into overlapping tiles, for objects too small to survive its scaling."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from yolov7.boxes import (
    box_area,
    clip_boxes,
    cxcywh_to_xyxy,
    frame_table,
    in_frames,
    intersection,
    xyxy_to_cxcywh,
)
from yolov7.engine.frames import (
    Done,
    Forward,
    Found,
    HostFrames,
    Pixels,
    equal_shapes,
    milliseconds,
)
from yolov7.letterbox import Geometry
from yolov7.suppression import Suppression

Tile = tuple[int, int, int, int]  # left, top, right, bottom in pixels of the image

COVERED = 0.7  # share of a cut box that a whole one has to hold
EDGE = 0.01  # share of a tile's width within which a box ends at its edge


class TiledFrames:
    """Images as a whole and in tiles, with one suppression over all views of an image.

    Args:
        network: What is run.
        suppression: What is kept.
        batch: Views at a time.
        tile: Side of a tile in pixels of the image.
        overlap: Least share of a tile that its neighbour covers too.
        fit: The letterbox of an image of (height, width).
    """

    in_flight = 0

    def __init__(
        self,
        network: Forward,
        suppression: Suppression,
        batch: int,
        *,
        tile: int,
        overlap: float,
        fit: Callable[[tuple[int, int]], Geometry],
    ) -> None:
        self._host = HostFrames(network, suppression, batch)
        self._device, self._conf, self._max_det = (
            network.device,
            suppression.conf,
            suppression.max_det,
        )
        self._batch, self._tile, self._overlap, self._fit = batch, tile, overlap, fit

    def prepare(self, pixels: Pixels, geometry: Geometry) -> Pixels:  # noqa: ARG002  # of the whole
        """Nothing: its views are cut and letterboxed in `submit`."""
        return pixels

    def submit(self, prepared: Sequence[Pixels], where: Sequence[Geometry]) -> Done:
        """Detect, one image after the other."""
        ms = dict.fromkeys(("pre", "network", "nms"), 0.0)
        parts = [
            self._detect(image, geometry, ms)
            for image, geometry in zip(prepared, where, strict=True)
        ]
        boxes = torch.zeros(len(parts), self._max_det, 6)
        for target, (rows, _) in zip(boxes, parts, strict=True):
            target[: len(rows)] = rows
        counts = torch.tensor([len(rows) for rows, _ in parts], dtype=torch.int32)
        overflow = torch.tensor([beyond for _, beyond in parts], dtype=torch.int32)
        return Done(Found(boxes, counts, overflow, ms))

    @torch.no_grad()
    def _detect(self, image: Pixels, whole: Geometry, ms: dict[str, float]) -> tuple[Tensor, int]:
        """Boxes [n, 6] of one image, and candidates that were not looked at."""
        height, width = shape = (int(image.shape[0]), int(image.shape[1]))
        tiles = tile_grid(shape, self._tile, self._overlap)
        views = [(0, 0, width, height), *(tiles if len(tiles) > 1 else [])]
        fits = [
            whole,
            *(self._fit((bottom - top, right - left)) for left, top, right, bottom in views[1:]),
        ]
        # Suppression works in pixels of the whole image's letterbox: its class offsets are made
        # for coordinates below 4096.
        scale, host, device = whole.ratio[0], self._host, self._device
        candidates = []
        for chunk in equal_shapes([geometry.shape for geometry in fits], self._batch):
            start = milliseconds(device)
            where = [fits[index] for index in chunk]
            boxed = [host.prepare(_cut(image, views[index]), fits[index]) for index in chunk]
            decoded, spent = host.decode(boxed, where)
            predicted = milliseconds(device)
            for index, rows in zip(chunk, decoded, strict=True):
                rows = rows[rows[:, 4] > self._conf]
                candidates.append(_in_image(rows, views[index], fits[index], scale))
            ms["network"] += spent["network"]
            ms["pre"] += predicted - start - spent["network"]
            ms["nms"] += milliseconds(device) - predicted
        start = milliseconds(device)
        found = host.suppress(torch.cat(candidates)[None])
        detections = found.boxes[0, : int(found.counts[0])]
        if len(tiles) > 1:
            detections = drop_cut_boxes(detections, tiles, shape, scale)
        detections[:, :4] = clip_boxes(detections[:, :4] / scale, shape)
        ms["nms"] += milliseconds(device) - start
        return detections, int(found.overflow[0])


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


def _cut(image: Pixels, view: Tile) -> Pixels:
    left, top, right, bottom = view
    return image[top:bottom, left:right]


def _in_image(rows: Tensor, view: Tile, where: Geometry, scale: float) -> Tensor:
    """Decoded rows [n, 5 + classes] of a letterboxed view in pixels of the image times ``scale``.

    Args:
        rows: Centre x, y, width, height in pixels of the letterbox; the rest is passed on.
        view: Where it lies in the image, at whose edges boxes are cut.
        where: Its letterbox.
        scale: From pixels of the image to those that are wanted.
    """
    left, top, _, _ = view
    table = frame_table([where]).to(rows.device)
    boxes = in_frames(cxcywh_to_xyxy(rows[None, :, :4]), table)[0]
    boxes = xyxy_to_cxcywh(boxes + boxes.new_tensor((left, top, left, top))) * scale
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
    most = COVERED * box_area(boxes)[:, None]
    held = (intersection(boxes, boxes) > most) & (label[:, None] == label) & ~piece
    return detections[~(piece & held.any(1))]


def _ends_at(ends: Tensor, lines: set[int], scale: float, near: float) -> Tensor:
    """Which boxes, by their two ends [n, 2] along an axis, end near one of the lines: [n] bool."""
    at = ends.new_tensor(sorted(lines)) * scale
    return ((ends[:, :, None] - at).abs() < near).any(-1).any(-1)
