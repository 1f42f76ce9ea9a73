"""Letterbox on the CPU: fit an image into the network's input without changing its aspect."""

from dataclasses import dataclass, replace
from functools import lru_cache

import cv2
import numpy as np
from numpy.typing import NDArray

from yolov7.kernels.letterbox import GREY as GREY  # for all who letterbox on the CPU

Image = NDArray[np.uint8]  # HWC, BGR


@dataclass(frozen=True)
class Geometry:
    """Where a frame lies in its letterbox; `yolov7.boxes.in_frames` takes boxes back.

    Attributes:
        frame: (height, width) of the frame.
        ratio: Scale (x, y) from the frame to the letterbox.
        pad: Grey pixels (x, y) on each side, before rounding: halves occur.
        size: (height, width) of the scaled frame.
        border: Whole grey pixels (top, bottom, left, right).
    """

    frame: tuple[int, int]
    ratio: tuple[float, float]
    pad: tuple[float, float]
    size: tuple[int, int]
    border: tuple[int, int, int, int]

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) of the letterbox."""
        top, bottom, left, right = self.border
        return self.size[0] + top + bottom, self.size[1] + left + right

    def seen_from(self, frame: tuple[int, int]) -> "Geometry":
        """The same letterbox of a frame (height, width) that was scaled to this one before."""
        ratio_x = self.frame[1] / frame[1] * self.ratio[0]
        ratio_y = self.frame[0] / frame[0] * self.ratio[1]
        return replace(self, frame=frame, ratio=(ratio_x, ratio_y))


@lru_cache(maxsize=256)  # a video asks for the same one again and again
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
    return Geometry((height, width), (ratio, ratio), (half_x, half_y), (new_h, new_w), border)


def round_up(side: int, stride: int) -> int:
    """The next multiple of `stride`."""
    return -(-side // stride) * stride


def letterbox(image: Image, geometry: Geometry) -> Image:
    """Scale an image and fill up with grey, the image in the middle.

    Args:
        image: [H, W, 3] uint8.
        geometry: From `letterbox_geometry`, of this image or of the frame it was scaled from.

    Returns:
        [h, w, 3] uint8 of the geometry's shape.
    """
    height, width = geometry.size
    if image.shape[:2] != geometry.size:
        resized = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
        image = resized.astype(np.uint8, copy=False)
    top, bottom, left, right = geometry.border
    grey = (GREY, GREY, GREY)
    boxed = cv2.copyMakeBorder(image, top, bottom, left, right, cv2.BORDER_CONSTANT, value=grey)
    return np.asarray(boxed, dtype=np.uint8)
