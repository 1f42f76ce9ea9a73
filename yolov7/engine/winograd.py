"""Winograd convolution for `torch.compile` on a CPU: a quarter of the multiplications.

Winograd's minimal filtering F(4x4, 3x3) after Lavin and Gray, 2015
(https://arxiv.org/abs/1509.09308): of an input tile d [6, 6] and a kernel g [3, 3] it makes the
output tile A' ((G g G') * (B' d B)) A [4, 4] with 36 products instead of 144. Summed over the
channels they are 36 matrix products, which oneDNN does as one grouped 1x1 convolution; Inductor
makes plain loops of the transformations, which eager PyTorch would do term by term.
"""

import inspect
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolov7.blocks import Conv, RepConv
from yolov7.model import YOLOv7

# Inductor generates the code of such a function once for each shape, not once for each layer.
_once_per_shape = torch.compiler.nested_compile_region
if "max_reuse_entries" in inspect.signature(_once_per_shape).parameters:  # from torch 2.12 on
    _once_per_shape = partial(_once_per_shape, max_reuse_entries=1000)

TILE, WINDOW = 4, 6
LEAST = 64  # channels: with fewer the transformations cost more than they save
ENOUGH = 128  # channels that save more than transformations outside of the cache cost
CACHE = 16 << 20  # bytes of tiles and products
LANES = 16  # oneDNN's grouped convolution is fast for multiples of a vector
_INPUT = torch.tensor(  # B', for the points 0, 1, -1, 2, -2 and infinity
    [
        [4.0, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_KERNEL = torch.tensor(  # 24 G
    [[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], dtype=torch.float64
)
_OUTPUT = torch.tensor(  # A'
    [[1.0, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)
_ONES = WINDOW + 1  # the product that enters all outputs of a tile once, the bias with it


class WinogradConv(nn.Module):
    """A 3x3 convolution of stride 1 and padding 1 in fp32, with bias and activation.

    It differs from the convolution by some 1e-6 of its output; bf16 is too coarse for it.

    With few channels on large maps, whose tiles leave the cache, it is the plain convolution.

    Args:
        conv: What it does; its weight is kept transformed, four times as large.
        act: Of its output.
    """

    weight: Tensor  # [36 * outputs, inputs, 1, 1]
    bias: Tensor  # [36 * outputs]

    def __init__(self, conv: nn.Conv2d, act: nn.Module) -> None:
        super().__init__()
        assert conv.bias is not None
        kernel = conv.weight.detach().double()
        weight = torch.einsum("ia,kcab,jb->ijkc", _KERNEL, kernel, _KERNEL).flatten(0, 2) / 24**2
        bias = torch.zeros(WINDOW * WINDOW, conv.out_channels)
        bias[_ONES] = conv.bias.detach()
        self.register_buffer("weight", weight[..., None, None].float())
        self.register_buffer("bias", bias.flatten())
        self.act = act
        self.direct = conv if min(conv.in_channels, conv.out_channels) < ENOUGH else None

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, outputs, H, W]."""
        height, width = x.shape[2:]
        if self.direct is not None and _tile_bytes(self.direct, x) > CACHE:
            return self.act(self.direct(x))
        tiles = _split(x.permute(0, 2, 3, 1))
        products = F.conv2d(tiles.permute(0, 3, 1, 2), self.weight, self.bias, groups=WINDOW**2)
        x = _join(products.permute(0, 2, 3, 1), self.act)
        return x[:, :height, :width].permute(0, 3, 1, 2)


@_once_per_shape
def _split(x: Tensor) -> Tensor:
    """B' d B of the tiles d of x [B, H, W, C]: [B, rows, columns, 36 * C]."""
    bottom, right = (1 + -side % TILE for side in x.shape[1:3])
    x = _stored(F.pad(x, (0, 0, 1, right, 1, bottom)).contiguous())
    x = _stored(_along(2, _INPUT, x.unfold(1, WINDOW, TILE).movedim(-1, 2)))
    return _along(4, _INPUT, x.unfold(3, WINDOW, TILE).permute(0, 1, 3, 2, 5, 4)).flatten(3)


@_once_per_shape
def _join(products: Tensor, act: Callable[[Tensor], Tensor]) -> Tensor:
    """The activation of A' m A for the products m [B, rows, columns, 36 * C]: [B, H, W, C]."""
    x = _stored(_along(4, _OUTPUT, products.unflatten(3, (WINDOW, WINDOW, -1)))).movedim(3, 2)
    return act(_along(2, _OUTPUT, x)).flatten(3, 4).flatten(1, 2)


def _along(dim: int, matrix: Tensor, x: Tensor) -> Tensor:
    """The matrix [n, m] times x along its dimension `dim` of m."""
    matrix = matrix.view(*matrix.shape, *[1] * (x.ndim - dim - 1))
    return (matrix * x.unsqueeze(dim)).sum(dim + 1)


def _stored(x: Tensor) -> Tensor:
    """x, for Inductor to write to memory instead of computing it anew for each of its readers."""
    return x.as_strided(x.shape, x.stride())


def _tile_bytes(conv: nn.Conv2d, x: Tensor) -> int:
    """Of the tiles of x [B, C, H, W] and their products."""
    tiles = x.shape[0] * -(-x.shape[2] // TILE) * -(-x.shape[3] // TILE)
    return 4 * WINDOW**2 * tiles * (conv.in_channels + conv.out_channels)


def use_winograd(model: YOLOv7) -> None:
    """Replace the convolutions of a fused model that gain by it, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (Conv, RepConv)):
            assert isinstance(module.conv, nn.Conv2d)  # RepConv has it once it is fused
            if _gains(module.conv):
                model.set_submodule(name, WinogradConv(module.conv, module.act))


def _gains(conv: nn.Conv2d) -> bool:
    channels = (conv.in_channels, conv.out_channels)
    return (
        (conv.kernel_size, conv.stride, conv.groups) == ((3, 3), (1, 1), 1)
        and min(channels) >= LEAST
        and not any(count % LANES for count in channels)
    )
