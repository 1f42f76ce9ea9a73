"""A RepConv folded on the device, beside plain PyTorch."""

from functools import partial

import pytest
import torch
from torch import Tensor

from bench.comparison import Comparison, close
from yolov7.benchmark.clock import Work
from yolov7.kernels.reparam import reparam, reparam_reference


def norm(channels: int, device: torch.device) -> Tensor:
    """Scale, shift, mean and variance [4, K], all of them positive."""
    return torch.rand(4, channels, dtype=torch.float64, device=device) + 0.5


@pytest.mark.parametrize("channels", [(128, 256), (512, 1024)], ids="{0[0]} to {0[1]}".format)
@torch.no_grad()
def bench_reparam(
    channels: tuple[int, int], compete: Comparison, kernel_device: torch.device, smoke: bool
) -> None:
    """fp32 branches to one fp32 weight, in fp64 both."""
    inputs, outputs = (16, 24) if smoke else channels
    torch.manual_seed(0)
    dense = torch.randn(outputs, inputs, 3, 3, device=kernel_device)
    pointwise = torch.randn(outputs, inputs, 1, 1, device=kernel_device)
    branches = (dense, norm(outputs, kernel_device), pointwise, norm(outputs, kernel_device), None)

    contenders = {
        "ours": partial(reparam, *branches),
        "eager": partial(reparam_reference, *branches),
    }

    moved = 4 * (2 * dense.numel() + pointwise.numel())
    compete(contenders, agree=close(1e-6), work=Work(bytes=moved), whole=True)
