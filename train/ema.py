"""The moving average of the weights, which is what is validated and saved."""

import copy
import math

import torch
from torch import Tensor

from yolov7.model import YOLOv7

DECAY = 0.9999
RAMP = 2000  # steps over which the decay rises


class EMA:
    """Exponential moving average of all floating tensors of a model.

    Args:
        model: copied; the copy is in evaluation mode and takes no gradients.
    """

    def __init__(self, model: YOLOv7) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)
        self.updates = 0

    @torch.no_grad()
    def update(self, model: YOLOv7) -> None:
        """Take in the weights after an optimizer step."""
        self.updates += 1
        decay = DECAY * (1 - math.exp(-self.updates / RAMP))
        averages: list[Tensor] = []
        values: list[Tensor] = []
        state = model.state_dict()
        for name, average in self.model.state_dict().items():
            if average.is_floating_point():
                averages.append(average)
                values.append(state[name].detach())
            else:
                average.copy_(state[name])
        torch._foreach_lerp_(averages, values, 1 - decay)
