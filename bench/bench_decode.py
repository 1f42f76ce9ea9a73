"""The detection head: 1x1 convolutions, sigmoid, grid, anchors, threshold."""

from typing import Any

import pytest
import torch
from torch import Tensor

from bench.comparison import Comparison, close
from yolov7.benchmark.clock import Run, Work, captured
from yolov7.head import Detect
from yolov7.kernels.conv import pack_weight
from yolov7.kernels.decode import decode
from yolov7.kernels.layout import PitchedLayout
from yolov7.model import channels_last
from yolov7.variants import VARIANTS

BATCHES = (1, 32)
CHANNELS, CLASSES = (256, 512, 1024), 80


@pytest.mark.parametrize("batch", BATCHES, ids="640, dense, batch {}".format)
@torch.no_grad()
def bench_decode(batch: int, compete: Comparison, kernel_device: torch.device, smoke: bool) -> None:
    """Ours in one launch, the model's own head in PyTorch's, fp16."""
    size, channels, classes, batch = (
        (64, (16, 16, 32), 3, 1) if smoke else (640, CHANNELS, CLASSES, batch)
    )
    variant = VARIANTS["yolov7"]
    torch.manual_seed(0)
    made = Detect(channels, classes, variant.anchors, variant.strides, implicit=False)
    head: Any = channels_last(made, kernel_device, torch.float16)  # its layers are Conv2d
    head.anchors = head.anchors.float()
    sides = [size // stride for stride in variant.strides]
    images = [
        torch.randn(batch, c, side, side, device=kernel_device).half()
        for c, side in zip(channels, sides, strict=True)
    ]

    def ours() -> Run:
        layouts = [PitchedLayout.of(batch, side, side) for side in sides]
        maps = [layout.from_nchw(image) for layout, image in zip(layouts, images, strict=True)]
        weights = [pack_weight(conv.weight) for conv in head.lead]
        biases = [conv.bias.float() for conv in head.lead]
        arguments = (maps, weights, biases, head.anchors, layouts, variant.strides)
        return captured(lambda: decode(*arguments)[0], kernel_device)

    def eager() -> Run:
        inputs = [image.contiguous(memory_format=torch.channels_last) for image in images]

        def run() -> Tensor:
            return head.decode(head.raw(inputs))

        return captured(run, kernel_device)

    weights = sum(conv.weight.numel() for conv in head.lead)
    rows = 3 * sum(side * side for side in sides)
    elements = sum(image.numel() for image in images)
    flops = sum(
        2 * batch * side * side * 3 * (5 + classes) * c
        for side, c in zip(sides, channels, strict=True)
    )
    moved = 2 * (elements + weights) + 4 * batch * rows * (5 + classes)
    compete(
        {"ours": ours(), "eager": eager()},
        agree=close(2e-3),
        work=Work(flops, moved, torch.float16, batch),
    )
