"""Test-time augmentation: one network that looks at several views of its images."""

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov7.engine.frames import Forward
from yolov7.letterbox import GREY, round_up

VIEWS = ((1.0, False), (0.83, True), (0.67, False))  # scale, mirrored


class Augmented:
    """Decoded boxes of three scales of the images, one mirrored, one after the other.

    Args:
        network: What looks at them.
    """

    def __init__(self, network: Forward) -> None:
        self.network = network
        self.device, self.dtype, self.one_shape = network.device, network.dtype, network.one_shape
        self.names, self.stride = network.names, network.stride

    def __call__(self, x: Tensor) -> Tensor:
        """Boxes [B, N, 5 + classes] in pixels of x [B, 3, H, W], RGB in 0..1."""
        height, width = x.shape[2:]
        decoded = []
        for scale, mirrored in VIEWS:
            view = x.flip(3) if mirrored else x
            if scale != 1:
                size = (round(height * scale), round(width * scale))
                view = F.interpolate(view, size=size, mode="bilinear", align_corners=False)
                below, right = (round_up(side, self.stride) - side for side in size)
                border = (0, right, 0, below)
                view = F.pad(view, border, value=GREY / 255)
            boxes = self.network(view)
            boxes[..., :4] /= scale
            if mirrored:
                boxes[..., 0] = width - boxes[..., 0]
            decoded.append(boxes)
        return torch.cat(decoded, 1)
