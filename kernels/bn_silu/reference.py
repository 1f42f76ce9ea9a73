"""Batch norm and activation in plain PyTorch, in fp32, or in fp64 where the input is."""

import torch
import torch.nn.functional as F
from torch import Tensor


def _wide(x: Tensor) -> Tensor:
    """At least fp32; fp64 stays, for `gradcheck`."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def stats_reference(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> Tensor:
    """Statistics [3, C] of x [M, C]; the running ones move towards them."""
    wide = _wide(x)
    mean = wide.mean(0)
    count = torch.full_like(mean, x.shape[0])
    stats = torch.stack((count, mean, (wide - mean).square().sum(0)))
    return merge_reference(stats[None], running_mean, running_var, momentum)


def merge_reference(
    stats: Tensor, running_mean: Tensor | None, running_var: Tensor | None, momentum: float
) -> Tensor:
    """Statistics [3, C] of all parts [S, 3, C] together; the running ones move towards them."""
    counts, means, squares = stats.unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    square = (squares + counts * (means - mean).square()).sum(0)
    if running_mean is not None and running_var is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), momentum)
        running_var.lerp_((square / (count - 1)).to(running_var.dtype), momentum)
    return torch.stack((count, mean, square))


def _normalised(x: Tensor, stats: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(var + eps) and 1 / sqrt(var + eps)."""
    count, mean, square = stats
    inverse = (square / count + eps).rsqrt()
    return (_wide(x) - mean) * inverse, inverse


def forward_reference(
    x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str
) -> Tensor:
    """act(batch norm) of x [M, C]."""
    z = _normalised(x, stats, eps)[0] * weight + bias
    if activation == "silu":
        z = F.silu(z)
    elif activation == "leaky_relu":
        z = F.leaky_relu(z, 0.1)
    return z.to(x.dtype)


def _dz_reference(dy: Tensor, xn: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    z = xn * weight + bias
    if activation == "silu":
        s = z.sigmoid()
        return _wide(dy) * s * (1 + z * (1 - s))
    if activation == "leaky_relu":
        return _wide(dy) * torch.where(z > 0, 1.0, 0.1)
    return _wide(dy)


def sums_reference(
    dy: Tensor, x: Tensor, stats: Tensor, weight: Tensor, bias: Tensor, eps: float, activation: str
) -> Tensor:
    """Sums [2, C] of dz and of dz xn over the rows."""
    xn, _ = _normalised(x, stats, eps)
    dz = _dz_reference(dy, xn, weight, bias, activation)
    return torch.stack((dz.sum(0), (dz * xn).sum(0)))


def backward_reference(
    dy: Tensor,
    x: Tensor,
    stats: Tensor,
    weight: Tensor,
    bias: Tensor,
    sums: Tensor | None,
    eps: float,
    activation: str,
) -> Tensor:
    """The gradient of x [M, C]; without sums, the statistics do not depend on x."""
    xn, inverse = _normalised(x, stats, eps)
    dz = _dz_reference(dy, xn, weight, bias, activation)
    if sums is not None:
        dz = dz - (sums[0] + xn * sums[1]) / stats[0]
    return (dz * inverse * weight).to(x.dtype)
