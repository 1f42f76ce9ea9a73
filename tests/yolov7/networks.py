"""Stand-ins for networks."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class StandIn:
    """A function from images to decoded boxes in the place of a network."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        names: Sequence[str] = ("a", "b"),
        *,
        dtype: torch.dtype = torch.float32,
        one_shape: bool = False,
    ) -> None:
        self.forward, self.names, self.stride = forward, list(names), 32
        self.device, self.dtype, self.one_shape = torch.device("cpu"), dtype, one_shape

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)
