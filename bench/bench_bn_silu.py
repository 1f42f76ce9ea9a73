"""Batch norm and SiLU of training, forward and backward."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.comparison import Comparison, close
from yolov7.benchmark.clock import Work, captured
from yolov7.kernels.bn_silu import batch_norm_act

EPS, MOMENTUM = 1e-3, 0.03


@pytest.mark.parametrize("side", [160, 80, 20], ids="64 x 128 x {0} x {0}, bf16".format)
def bench_bn_silu(side: int, compete: Comparison, kernel_device: torch.device, smoke: bool) -> None:
    """The gradient of a map, in channels_last; its three maps forward and five backward."""
    batch, channels, side = (2, 16, 5) if smoke else (64, 128, side)
    random = torch.Generator().manual_seed(0)
    # The interpreter does not compute in bf16.
    dtype = torch.bfloat16 if kernel_device.type == "cuda" else torch.float32
    shape = (batch, channels, side, side)
    x, gradient = (
        torch.randn(shape, generator=random)
        .to(kernel_device, dtype)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    )
    x.requires_grad_()
    weight, bias = (torch.rand(channels, device=kernel_device).requires_grad_() for _ in range(2))
    mean, var = (make(channels, device=kernel_device) for make in (torch.zeros, torch.ones))

    def backward(y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, (x, weight, bias), gradient)

    def ours() -> tuple[Tensor, ...]:
        y = batch_norm_act(x, weight, bias, mean, var, training=True, momentum=MOMENTUM, eps=EPS)
        return backward(y)

    def eager() -> tuple[Tensor, ...]:
        y = F.batch_norm(x, mean, var, weight, bias, training=True, momentum=MOMENTUM, eps=EPS)
        return backward(F.silu(y))

    contenders = {"ours": captured(ours, kernel_device), "eager": captured(eager, kernel_device)}

    moved = 8 * x.numel() * x.element_size()
    compete(contenders, agree=close(2e-2), work=Work(bytes=moved, items=batch))
