"""Pools and upsampling between channel slices, beside PyTorch's operations and their concat."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.comparison import Comparison, equal
from yolov7.benchmark.clock import Run, Work, captured
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.pool import max_pool, spp, upsample

CASES = {
    f"{operation}, batch {batch}": (operation, batch)
    for operation in ("spp", "max pool", "upsample")
    for batch in (1, 32)
}


def resized(layout: PitchedLayout, h: int, w: int) -> PitchedLayout:
    """The layout of maps of another size."""
    return PitchedLayout.of(layout.n, h, w)


@pytest.mark.parametrize(("operation", "batch"), CASES.values(), ids=CASES)
def bench_pool(
    operation: str, batch: int, compete: Comparison, kernel_device: torch.device, smoke: bool
) -> None:
    """512 channels of 20 x 20 pixels, fp16, written into slices of a wider map."""
    side, channels, batch = (6, 16, 1) if smoke else (20, 512, batch)
    source = PitchedLayout.of(batch, side, side)
    images = torch.randn(batch, channels, side, side).to(kernel_device, torch.float16)
    target = {
        "spp": source,
        "max pool": resized(source, side // 2, side // 2),
        "upsample": resized(source, 2 * side, 2 * side),
    }[operation]
    parts = 4 if operation == "spp" else 1

    def ours() -> Run:
        wide = target.empty(channels * parts, dtype=torch.float16, device=kernel_device)
        outs = list(wide.split(channels, 1))
        x = source.from_nchw(images)

        def run() -> Tensor:
            if operation == "spp":
                spp(x, source, outs, (1, 5, 9, 13))
            elif operation == "max pool":
                max_pool(x, source, outs[0], target)
            else:
                upsample(x, source, outs[0], target)
            return wide

        return captured(run, kernel_device)

    def eager() -> Run:
        x = images.contiguous(memory_format=torch.channels_last)

        def run() -> Tensor:
            if operation == "spp":
                return torch.cat([x, *(F.max_pool2d(x, k, 1, k // 2) for k in (5, 9, 13))], 1)
            if operation == "max pool":
                return F.max_pool2d(x, 2)
            return F.interpolate(x, scale_factor=2.0, mode="nearest")

        return captured(run, kernel_device)

    moved = images.numel() + batch * channels * parts * target.h * target.w
    compete(
        {"ours": ours(), "eager": eager()},
        agree=lambda actual, expected: equal(actual, target.to_nchw(expected)),
        work=Work(bytes=2 * moved, items=batch),
    )
