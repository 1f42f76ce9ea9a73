"""What makes a forward fast on a CPU, beside the memory layout.

oneDNN convolutions run with weights packed once and the activation applied to the accumulators:
what Inductor generates too, without its start-up. Decoding works in place. And freed memory is
kept: by default glibc hands every large block back to the system, and a forward of yolov7-tiny at
640 pixels then spends up to a third of its time on 15 000 page faults.
"""

import ctypes
import os
import platform
import threading
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from yolov7 import cores
from yolov7.blocks import Conv, RepConv
from yolov7.head import Detect
from yolov7.model import YOLOv7

_PACKING = threading.Lock()


def keep_freed_memory() -> None:
    """Ask glibc to keep what is freed for the next allocation; elsewhere nothing happens.

    It holds for the whole process, whose memory then stays at its peak.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL(None)
        mmap_threshold, trim_threshold = -3, -1  # of malloc.h
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, (1 << 31) - 1)


def give_back_freed_memory() -> None:
    """Return to the system what is free now: what loading needed. Elsewhere than in glibc nothing.

    A yolov7 in int8 then holds half of what it holds in fp32; before it was the same.
    """
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def keep_to_quota() -> None:
    """Use no more threads than the CPU quota of a container amounts to.

    It holds for the whole process; OMP_NUM_THREADS and fewer threads are left as they are.
    """
    quota = cores.cpu_quota()
    if quota and quota < torch.get_num_threads() and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(quota)


class PackedConv(nn.Module):
    """oneDNN convolution, bias and activation in one call, weights packed for the first input.

    Args:
        conv: What it does, with a bias.
        act: SiLU, LeakyReLU, or none.
    """

    def __init__(self, conv: nn.Conv2d, act: nn.Module | None) -> None:
        super().__init__()
        self.geometry = (list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups)
        self.weight: Tensor = conv.weight.detach()
        self.bias = None if conv.bias is None else conv.bias.detach()
        self.packed = False
        match act:
            case None:
                self.post: tuple[str, list[float], str] = ("none", [], "")
            case nn.SiLU():
                self.post = ("swish", [], "")
            case nn.LeakyReLU():
                self.post = ("leaky_relu", [act.negative_slope], "")
            case _:
                raise ValueError(f"no oneDNN form of {act}")

    def forward(self, x: Tensor) -> Tensor:
        if not self.packed:
            self._pack(list(x.shape))
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, *self.geometry, *self.post
        )
        return result

    def _pack(self, shape: list[int]) -> None:
        """Bring the weight into oneDNN's order, once, whichever thread is first."""
        with _PACKING:
            if not self.packed:
                self.weight = self._reordered(shape)
                self.packed = True

    def _reordered(self, shape: list[int]) -> Tensor:
        reorder = torch.ops.mkldnn._reorder_convolution_weight
        weight: Tensor = reorder(self.weight, *self.geometry, shape)
        return weight


def can_pack() -> bool:
    """Whether this machine has oneDNN's packed convolutions."""
    return torch._C._has_mkldnn and platform.machine() in ("x86_64", "AMD64")


def pack_convolutions(model: YOLOv7) -> None:
    """Replace the convolutions of a fused model by packed ones, in place."""
    for name, module in list(model.named_modules()):
        if isinstance(module, (Conv, RepConv)):
            assert isinstance(module.conv, nn.Conv2d)  # RepConv has it once it is fused
            model.set_submodule(name, PackedConv(module.conv, module.act))
    for level, conv in enumerate(model.head.lead):
        assert isinstance(conv, nn.Conv2d)
        model.head.lead[level] = PackedConv(conv, None)


class Decoder:
    """`Detect.decode` in two passes over the memory instead of four, and three over the boxes.

    It is neither differentiable nor to be traced. With s the sigmoid, a coordinate is
    s (linear + square s) + offset: 2 stride s + (cell - 1/2) stride for a centre, 4 anchor s^2 for
    a size. Of the 22 ms of yolov7-tiny in bf16 it saves one, and three of what Inductor makes of
    `Detect.decode`.

    Args:
        head: Of the model.
    """

    def __init__(self, head: Detect) -> None:
        self.head = head
        self._latest: tuple[list[tuple[int, int]], list[Tensor]] = ([], [])

    def __call__(self, raw: Sequence[Tensor]) -> Tensor:
        """What `Detect.decode` returns for the raw outputs of the lead levels."""
        sides = [(y.shape[2], y.shape[3]) for y in raw]
        latest = self._latest
        if sides != latest[0]:
            latest = self._latest = sides, self._coefficients(sides)
        linear, square, offset = latest[1]
        counts = [y.shape[1:4].numel() for y in raw]
        decoded = torch.empty(raw[0].shape[0], sum(counts), self.head.num_outputs)
        for part, y in zip(decoded.split(counts, 1), raw, strict=True):
            part.view(y.shape).copy_(y)
        boxes = decoded.sigmoid_()[..., :4]
        torch.addcmul(offset, torch.addcmul(linear, square, boxes), boxes, out=boxes)
        return decoded

    def _coefficients(self, sides: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The three coefficients, each [boxes, 4]."""
        levels = []
        for (height, width), anchors, stride in zip(
            sides, self.head.anchors, self.head.strides, strict=False
        ):
            linear, square, offset = torch.zeros(3, len(anchors), height, width, 4)
            linear[..., :2] = 2 * stride
            square[..., 2:] = 4 * anchors.view(-1, 1, 1, 2)
            offset[..., 0] = (torch.arange(width) - 0.5) * stride
            offset[..., 1] = (torch.arange(height).view(-1, 1) - 0.5) * stride
            levels.append(torch.stack([linear, square, offset]).flatten(1, 3))
        return list(torch.cat(levels, 1))
