"""The blocks of YOLOv7 (arXiv 2207.02696). Each knows how to fuse itself into plain convolutions.

A block registers its layers in the order of the authors' releases, so that weights can be matched
by position; where that differs from the order of execution, `forward` says so.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolov7.kernels.reparam import reparam

Activation = Literal["silu", "leaky_relu"]

BN_EPS = 1e-3
BN_MOMENTUM = 0.03


def _activation(name: Activation) -> nn.Module:
    return nn.SiLU() if name == "silu" else nn.LeakyReLU(0.1)


def activation_name(module: nn.Module) -> Literal["silu", "leaky_relu", "none"]:
    """What follows the convolutions of a block."""
    match getattr(module, "act", None):
        case nn.SiLU():
            return "silu"
        case nn.LeakyReLU():
            return "leaky_relu"
        case _:
            return "none"


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(channels, eps=BN_EPS, momentum=BN_MOMENTUM)


def _conv(inputs: int, out: int, kernel: int, stride: int, bias: bool = False) -> nn.Conv2d:
    return nn.Conv2d(inputs, out, kernel, stride, padding=kernel // 2, bias=bias)


def _norm(bn: nn.Module) -> Tensor:
    """A batch norm in evaluation as `reparam` takes it: scale, shift, mean, variance + eps."""
    assert isinstance(bn, nn.BatchNorm2d)
    assert bn.running_mean is not None
    assert bn.running_var is not None
    shift, variance = bn.bias.double(), bn.running_var.double() + bn.eps
    return torch.stack([bn.weight.double(), shift, bn.running_mean.double(), variance])


class Conv(nn.Module):
    """Convolution, batch norm, activation; fused: convolution with bias, activation."""

    def __init__(
        self, inputs: int, out: int, kernel: int, stride: int, activation: Activation
    ) -> None:
        super().__init__()
        self.out_channels = out
        self.conv = _conv(inputs, out, kernel, stride)
        self.bn: nn.Module = _batch_norm(out)
        self.act = _activation(activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.bn(self.conv(x)))

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the batch norm into the convolution, in place; again: nothing happens."""
        if isinstance(self.bn, nn.BatchNorm2d):
            weight, bias = reparam(self.conv.weight, _norm(self.bn))
            self.conv.weight.copy_(weight)
            self.conv.bias = nn.Parameter(bias)
            self.bn = nn.Identity()


class RepConv(nn.Module):
    """BN(3x3) + BN(1x1) [+ BN(x) where the channels match], activation; fused: one 3x3.

    Planned re-parameterisation (section 4.1): not to be used before a residual or a concat, where
    the identity branch would cancel the diversity of the gradients.
    """

    def __init__(self, inputs: int, out: int, activation: Activation) -> None:
        super().__init__()
        self.out_channels = out
        self.dense = nn.Sequential(_conv(inputs, out, 3, 1), _batch_norm(out))
        self.pointwise = nn.Sequential(_conv(inputs, out, 1, 1), _batch_norm(out))
        self.identity = _batch_norm(out) if inputs == out else None
        self.act = _activation(activation)
        self.conv: nn.Conv2d | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.conv is not None:
            return self.act(self.conv(x))
        y = self.dense(x) + self.pointwise(x)
        if self.identity is not None:
            y = y + self.identity(x)
        return self.act(y)

    @torch.no_grad()
    def fuse(self) -> None:
        """Fold the branches into one 3x3 convolution, in place; again: nothing happens."""
        if self.conv is not None:
            return
        dense, dense_bn = self.dense
        pointwise, pointwise_bn = self.pointwise
        assert isinstance(dense, nn.Conv2d)
        assert isinstance(pointwise, nn.Conv2d)
        weight, bias = reparam(
            dense.weight,
            _norm(dense_bn),
            pointwise.weight,
            _norm(pointwise_bn),
            None if self.identity is None else _norm(self.identity),
        )
        conv = _conv(weight.shape[1], weight.shape[0], 3, 1, bias=True)
        conv.weight, conv.bias = nn.Parameter(weight), nn.Parameter(bias)
        self.conv = conv
        del self.dense, self.pointwise, self.identity


class Elan(nn.Module):
    """Efficient layer aggregation: two 1x1 entries, a chain of 3x3, concat of taps, 1x1.

    Args:
        inputs: channels in.
        entry: channels of each entry.
        chain: channels of each 3x3.
        pairs: the chain has 2 * pairs convolutions.
        all_taps: concatenate every convolution of the chain; else the last of each pair.
        out: channels of the transition.
        activation: of every convolution.
    """

    def __init__(
        self,
        inputs: int,
        *,
        entry: int,
        chain: int,
        pairs: int,
        all_taps: bool,
        out: int,
        activation: Activation,
    ) -> None:
        super().__init__()
        self.out_channels = out
        self.all_taps = all_taps
        self.entry1 = Conv(inputs, entry, 1, 1, activation)
        self.entry2 = Conv(inputs, entry, 1, 1, activation)
        self.chain = nn.ModuleList(
            Conv(chain if i else entry, chain, 3, 1, activation) for i in range(2 * pairs)
        )
        taps = 2 * pairs if all_taps else pairs
        self.concat_channels = 2 * entry + taps * chain
        self.transition = Conv(self.concat_channels, out, 1, 1, activation)

    def forward(self, x: Tensor) -> Tensor:
        return self.transition(self.aggregate(x))

    def aggregate(self, x: Tensor) -> Tensor:
        """The concat that the transition reads."""
        taps = [self.entry1(x), y := self.entry2(x)]
        for i, conv in enumerate(self.chain):
            y = conv(y)
            if self.all_taps or i % 2:
                taps.append(y)
        return torch.cat(taps[::-1], 1)


class ParallelElan(nn.Module):
    """Extended ELAN: identical ELANs side by side, summed; with one branch, an ELAN."""

    def __init__(self, elan: Callable[[], Elan], branches: int) -> None:
        super().__init__()
        self.branches = nn.ModuleList(elan() for _ in range(branches))
        first = self.branches[0]
        assert isinstance(first, Elan)
        self.out_channels, self.concat_channels = first.out_channels, first.concat_channels

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sum of the branches, and the last branch alone (for an auxiliary head)."""
        outputs = [branch(x) for branch in self.branches]
        return sum(outputs[1:], outputs[0]), outputs[-1]

    def apart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The output of the only branch, and the concat that it is made of."""
        (branch,) = self.branches
        assert isinstance(branch, Elan)
        concat = branch.aggregate(x)
        return branch.transition(concat), concat


class MaxPool(nn.Module):
    """Max-pool 2x2, stride 2."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.out_channels = inputs

    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(x, 2, 2)


class PoolConv(nn.Module):
    """P5's downsampling: concat of [1x1 -> 3x3 stride 2, max-pool -> 1x1], half of `out` each."""

    def __init__(self, inputs: int, out: int, activation: Activation) -> None:
        super().__init__()
        half = out // 2
        self.out_channels = 2 * half
        self.pooled = Conv(inputs, half, 1, 1, activation)
        self.reduce = Conv(inputs, half, 1, 1, activation)
        self.strided = Conv(half, half, 3, 2, activation)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.strided(self.reduce(x)), self.pooled(F.max_pool2d(x, 2, 2))], 1)


class DownC(nn.Module):
    """E6's downsampling: concat of [1x1 (full) -> 3x3 stride 2, max-pool -> 1x1]."""

    def __init__(self, inputs: int, out: int, activation: Activation) -> None:
        super().__init__()
        half = out // 2
        self.out_channels = 2 * half
        self.reduce = Conv(inputs, inputs, 1, 1, activation)
        self.strided = Conv(inputs, half, 3, 2, activation)
        self.pooled = Conv(inputs, half, 1, 1, activation)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.strided(self.reduce(x)), self.pooled(F.max_pool2d(x, 2, 2))], 1)


def spatial_pyramid(x: Tensor, *, chained: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """Max-pools of 5, 9 and 13 pixels, stride 1, same size.

    Chained, each reads the one before, and they reach 5, 13 and 25 pixels. Else 9 is 5 of 5, and 13
    is 5 of 9.
    """
    second, third = (9, 13) if chained else (5, 5)
    pool5 = F.max_pool2d(x, 5, 1, 2)
    pool9 = F.max_pool2d(pool5, second, 1, second // 2)
    return pool5, pool9, F.max_pool2d(pool9, third, 1, third // 2)


class SPPCSPC(nn.Module):
    """Spatial pyramid pooling in a cross-stage partial block; `chained`: see `spatial_pyramid`."""

    def __init__(
        self, inputs: int, out: int, activation: Activation, *, chained: bool = False
    ) -> None:
        super().__init__()
        self.out_channels = out
        self.chained = chained
        self.cv1 = Conv(inputs, out, 1, 1, activation)
        self.cv2 = Conv(inputs, out, 1, 1, activation)  # the bypass
        self.cv3 = Conv(out, out, 3, 1, activation)
        self.cv4 = Conv(out, out, 1, 1, activation)
        self.cv5 = Conv(4 * out, out, 1, 1, activation)
        self.cv6 = Conv(out, out, 3, 1, activation)
        self.cv7 = Conv(2 * out, out, 1, 1, activation)

    def forward(self, x: Tensor) -> Tensor:
        y = self.cv4(self.cv3(self.cv1(x)))
        y = self.cv6(self.cv5(torch.cat([y, *spatial_pyramid(y, chained=self.chained)], 1)))
        return self.cv7(torch.cat([y, self.cv2(x)], 1))


class TinySPP(nn.Module):
    """tiny's pyramid: 1x1, pools, 1x1, beside a 1x1; concat; 1x1."""

    def __init__(self, inputs: int, out: int, activation: Activation) -> None:
        super().__init__()
        self.out_channels = out
        self.bypass = Conv(inputs, out, 1, 1, activation)
        self.reduce = Conv(inputs, out, 1, 1, activation)
        self.pooled = Conv(4 * out, out, 1, 1, activation)
        self.transition = Conv(2 * out, out, 1, 1, activation)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(x)
        pool5, pool9, pool13 = spatial_pyramid(y)
        y = self.pooled(torch.cat([pool13, pool9, pool5, y], 1))
        return self.transition(torch.cat([y, self.bypass(x)], 1))


class ReOrg(nn.Module):
    """P6's first layer: [B, C, H, W] to [B, 4 C, H/2, W/2], rows before columns of a 2x2 cell."""

    def forward(self, x: Tensor) -> Tensor:
        cells = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        return torch.cat(cells, 1)
