"""Boxes and labels on pictures."""

from collections.abc import Sequence
from importlib.util import find_spec

import cv2
import numpy as np
from numpy.typing import NDArray

from yolov7.letterbox import Image
from yolov7.text import printable

# BGR. Neighbours differ in hue and lightness, so that classes 0, 1, 2 of a small set stand apart.
PALETTE = (
    (56, 56, 255),
    (255, 144, 30),
    (60, 179, 30),
    (0, 165, 255),
    (211, 0, 148),
    (209, 206, 0),
    (147, 20, 255),
    (20, 110, 160),
    (0, 215, 255),
    (205, 90, 106),
    (113, 179, 60),
    (122, 150, 233),
    (160, 60, 20),
    (0, 190, 160),
    (255, 112, 200),
    (96, 96, 160),
    (235, 206, 135),
    (0, 90, 200),
    (128, 128, 0),
    (180, 105, 255),
)
FONT = cv2.FONT_HERSHEY_SIMPLEX

NO_PLOTS = "no curves or charts without matplotlib: pip install 'yolov7-triton[plots]'"


def can_plot() -> bool:
    """Whether matplotlib, the extra `plots`, is installed."""
    return find_spec("matplotlib") is not None


def class_colour(cls: int) -> tuple[int, int, int]:
    """BGR colour of a class, the same in every picture."""
    return PALETTE[cls % len(PALETTE)]


def draw_boxes(
    image: Image, boxes: NDArray[np.float32], labels: Sequence[str], classes: Sequence[int]
) -> Image:
    """A copy of an image with boxes and labels.

    Lines and letters grow with the picture. The first box is drawn last, on top of the others, and
    all labels on top of all boxes; a label keeps inside the picture.

    Args:
        image: [H, W, 3] uint8 BGR.
        boxes: [n, 4] xyxy in pixels.
        labels: A text per box.
        classes: A class number per box: the colour.
    """
    canvas = image.copy()
    line = max(round(sum(image.shape[:2]) / 2 * 0.0027), 2)
    corners = [tuple(round(float(x)) for x in box) for box in boxes]
    order = range(len(corners) - 1, -1, -1)
    for index in order:
        x1, y1, x2, y2 = corners[index]
        colour = class_colour(classes[index])
        cv2.rectangle(canvas, (x1, y1), (x2, y2), colour, line, cv2.LINE_AA)
    for index in order:
        x1, y1, _, _ = corners[index]
        _draw_label(canvas, labels[index], (x1, y1), class_colour(classes[index]), line)
    return canvas


def _draw_label(
    canvas: Image, text: str, corner: tuple[int, int], colour: tuple[int, int, int], line: int
) -> None:
    """A filled tag with text, standing on ``corner``, or hanging from it where there is no room."""
    text = printable(text)  # OpenCV ends the process at half a surrogate pair
    scale, thickness = max(line * 0.26, 0.42), max(line // 2, 1)
    (width, height), baseline = cv2.getTextSize(text, FONT, scale, thickness)
    margin = line + 1
    tag_h = height + baseline + margin
    left = max(min(corner[0] - line // 2, canvas.shape[1] - width - 2 * margin), 0)
    top = corner[1] - tag_h if corner[1] >= tag_h else corner[1]
    right, bottom = left + width + 2 * margin, top + tag_h
    cv2.rectangle(canvas, (left, top), (right, bottom), colour, cv2.FILLED)
    blue, green, red = colour
    light = 0.114 * blue + 0.587 * green + 0.299 * red > 150
    ink = (0, 0, 0) if light else (255, 255, 255)
    at = (left + margin, bottom - baseline - margin // 2 + 1)
    cv2.putText(canvas, text, at, FONT, scale, ink, thickness, cv2.LINE_AA)
