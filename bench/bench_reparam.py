"""RepConv folded on the device, beside the model's own folding."""

import copy

import pytest
import torch
from torch import Tensor, nn

from bench.comparison import Comparison, close
from yolov7.benchmark.clock import Work
from yolov7.blocks import RepConv
from yolov7.kernels.conv import pack_weight
from yolov7.kernels.reparam import reparam


def statistics(norm: nn.BatchNorm2d) -> Tensor:
    """Scale, shift, mean and variance [4, K], the first and the last made different from one."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.weight.uniform_(0.5, 1.5)
    norm.running_var.uniform_(0.5, 1.5)
    return torch.stack([norm.weight, norm.bias, norm.running_mean, norm.running_var])


@pytest.mark.parametrize("channels", [(128, 256), (512, 1024)], ids="{0[0]} to {0[1]}".format)
@torch.no_grad()
def bench_reparam(
    channels: tuple[int, int], compete: Comparison, kernel_device: torch.device, smoke: bool
) -> None:
    """fp32 branches to one packed weight in fp32; PyTorch folds in fp64 on a copy of the block."""
    inputs, outputs = (16, 24) if smoke else channels
    torch.manual_seed(0)
    block = RepConv(inputs, outputs, "silu").to(kernel_device).eval()
    dense, pointwise = (m.weight for m in block.modules() if isinstance(m, nn.Conv2d))
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    dense_norm, pointwise_norm = map(statistics, norms)

    def eager() -> tuple[Tensor, Tensor | None]:
        fused = copy.deepcopy(block)
        fused.fuse()
        assert fused.conv is not None
        return pack_weight(fused.conv.weight), fused.conv.bias

    contenders = {
        "ours": lambda: reparam(dense, pointwise, dense_norm, pointwise_norm),
        "eager": eager,
    }

    moved = 4 * (2 * dense.numel() + pointwise.numel())
    compete(contenders, agree=close(1e-5), work=Work(bytes=moved), whole=True)
