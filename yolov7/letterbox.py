"""Letterbox on the CPU: fit an image into the network's input without changing its aspect."""

from dataclasses import dataclass

import cv2
import numpy as np
from numpy.typing import NDArray

from yolov7.kernels.letterbox import GREY as GREY  # for all who letterbox on the CPU

Image = NDArray[np.uint8]  # HWC, BGR


@dataclass(frozen=True)
class Geometry:
    """Where the image lies in its letterbox.

    Attributes:
        ratio: Scale (x, y) from the image to the letterbox.
        pad: Grey pixels (x, y) on each side, before rounding: halves occur.
        size: (height, width) of the scaled image.
        border: Whole grey pixels (top, bottom, left, right).
    """

    ratio: tuple[float, float]
    pad: tuple[float, float]
    size: tuple[int, int]
    border: tuple[int, int, int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the letterbox."""
        top, bottom, left, right = self.border
        return self.size[0] + top + bottom, self.size[1] + left + right


def letterbox_geometry(
    shape: tuple[int, int],
    size: int | tuple[int, int],
    *,
    stride: int = 32,
    auto: bool = False,
    scaleup: bool = True,
) -> Geometry:
    """Work out a letterbox without touching a pixel.

    Args:
        shape: (height, width) of the image.
        size: Side of the square letterbox, or its (height, width), in pixels.
        stride: With ``auto``, grey is added only up to the next multiple of this.
        auto: The smallest letterbox that keeps the scale, instead of all of ``size``.
        scaleup: Whether an image smaller than ``size`` is enlarged.
    """
    height, width = shape
    limit_h, limit_w = (size, size) if isinstance(size, int) else size
    ratio = min(limit_h / height, limit_w / width)
    if not scaleup:
        ratio = min(ratio, 1.0)
    # A very long, thin image would lose its short side altogether.
    new_w, new_h = max(round(width * ratio), 1), max(round(height * ratio), 1)
    pad_x, pad_y = limit_w - new_w, limit_h - new_h
    if auto:
        pad_x, pad_y = pad_x % stride, pad_y % stride
    half_x, half_y = pad_x / 2, pad_y / 2
    border = (
        round(half_y - 0.1),
        round(half_y + 0.1),
        round(half_x - 0.1),
        round(half_x + 0.1),
    )
    return Geometry((ratio, ratio), (half_x, half_y), (new_h, new_w), border)


def letterbox(
    image: Image,
    size: int | tuple[int, int],
    *,
    stride: int = 32,
    auto: bool = False,
    scaleup: bool = True,
) -> tuple[Image, tuple[float, float], tuple[float, float]]:
    """Scale an image into ``size`` and fill up with grey, the image in the middle.

    Args:
        image: [H, W, 3] uint8.
        size: Side of the square letterbox, or its (height, width), in pixels.
        stride: With ``auto``, grey is added only up to the next multiple of this.
        auto: The smallest letterbox that keeps the scale, instead of all of ``size``.
        scaleup: Whether an image smaller than ``size`` is enlarged.

    Returns:
        The letterbox [h, w, 3], the scale (x, y), and the grey on each side (x, y) before rounding;
        ``boxes.unletterbox`` takes the last two.
    """
    height, width = image.shape[:2]
    geometry = letterbox_geometry((height, width), size, stride=stride, auto=auto, scaleup=scaleup)
    top, bottom, left, right = geometry.border
    if (height, width) == geometry.size:
        resized = image
    else:
        target = (geometry.size[1], geometry.size[0])
        resized = cv2.resize(image, target, interpolation=cv2.INTER_LINEAR).astype(
            np.uint8, copy=False
        )
    boxed = cv2.copyMakeBorder(
        resized, top, bottom, left, right, cv2.BORDER_CONSTANT, value=(GREY, GREY, GREY)
    )
    return np.asarray(boxed, dtype=np.uint8), geometry.ratio, geometry.pad
