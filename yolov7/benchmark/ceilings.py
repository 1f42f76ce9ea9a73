"""What this machine reaches at best, measured in the run that is held against it."""

import functools
from typing import Any

import torch
from torch import Tensor

from yolov7.benchmark.clock import Clock, Run, Work

REPEATS, AGAIN = 10, 4  # calls when first asked, and later


def _best(clock: Clock, run: Run, repeats: int) -> float:
    """Seconds of the fastest of some calls, after one that warms up."""
    clock(run)
    return min(clock(run) for _ in range(repeats))


class Ceilings:
    """Rates of the largest copy and of large matrix products, each measured when first asked for.

    Args:
        device: To measure.
        small: Measure toy sizes, for a dry run.
    """

    def __init__(self, device: torch.device, *, small: bool = False) -> None:
        self.device = device
        self.small = small
        self.clock = Clock(device)
        self._measured: dict[str, float] = {}

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes per second of a copy, those read and those written."""
        size = 1 << 16 if self.small else (1 << 30) if self.device.type == "cuda" else (256 << 20)
        source = torch.ones(size, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        rate = 2 * size / _best(self.clock, lambda: target.copy_(source), REPEATS)
        self._measured["copy GB/s"] = rate / 1e9
        return rate

    def flops(self, dtype: torch.dtype) -> float:
        """Operations per second of a matrix product in `dtype`, on random numbers.

        The best so far: asked again, it is measured again, shortly, since a busy machine may have
        been in the way.
        """
        name = f"{str(dtype).removeprefix('torch.')} TFLOP/s"
        side = 64 if self.small else 8192 if self.device.type == "cuda" else 1024
        a, b = (torch.randn(side, side, device=self.device) for _ in range(2))
        repeats = AGAIN if name in self._measured else REPEATS
        seconds = min(_best(self.clock, run, repeats) for run in _products(a, b, dtype))
        rate = 2 * side**3 / seconds
        self._measured[name] = max(rate / 1e12, self._measured.get(name, 0.0))
        return self._measured[name] * 1e12

    def share(self, work: Work, seconds: float) -> float:
        """Of the ceilings' time in `seconds`: 1 is as fast as can be, 0 nothing was counted."""
        least = 0.0
        # Kernels in the interpreter multiply fp8, libraries of a CPU don't.
        if work.flops and (self.device.type == "cuda" or work.dtype != torch.float8_e4m3fn):
            least = work.flops / self.flops(work.dtype)
        if work.bytes:
            least = max(least, work.bytes / self.bandwidth)
        return least / seconds

    def as_dict(self) -> dict[str, float]:
        """What was measured, by name with its unit."""
        return {name: round(value, 3) for name, value in self._measured.items()}


def _products(a: Tensor, b: Tensor, dtype: torch.dtype) -> list[Run]:
    """The product by every library that may be the fastest one here."""
    if dtype == torch.float8_e4m3fn:
        one = torch.ones((), device=a.device)
        a, b = a.to(dtype), b.t().contiguous().to(dtype).t()
        multiply: Any = torch._scaled_mm
        return [lambda: multiply(a, b, scale_a=one, scale_b=one, out_dtype=torch.float16)]
    a, b = a.to(dtype), b.to(dtype)
    runs: list[Run] = [lambda: a @ b]
    if a.device.type == "cpu":
        # As a 1x1 convolution, which oneDNN computes: on processors of AMD it is twice as fast as
        # the BLAS, on Intel's the BLAS is up to twice as fast.
        x, weight = a.t().reshape(1, len(a), 1, -1), b[:, :, None, None]
        x = x.contiguous(memory_format=torch.channels_last)
        weight = weight.contiguous(memory_format=torch.channels_last)
        runs.append(lambda: torch.conv2d(x, weight))
    return runs
