"""The copy that is left of a concat, when a producer could not write into its slice."""

import pytest
import torch

from bench.comparison import Comparison, equal
from yolov7.benchmark.clock import Work, captured
from yolov7.kernels.concat import concat
from yolov7.kernels.layout import PitchedLayout


@pytest.mark.parametrize("batch", [1, 32], ids="2 x 256 x 80 x 80, batch {}".format)
def bench_concat(batch: int, compete: Comparison, kernel_device: torch.device, smoke: bool) -> None:
    """Two maps behind one another in fp16, beside `torch.cat` of their matrices."""
    batch, channels, side = (1, 16, 5) if smoke else (batch, 256, 80)
    layout = PitchedLayout.of(batch, side, side)
    parts = [torch.randn(layout.rows, channels).to(kernel_device, torch.float16) for _ in range(2)]
    out = layout.empty(2 * channels, dtype=torch.float16, device=kernel_device)

    def ours() -> torch.Tensor:
        concat(parts, out)
        return out

    plain = captured(lambda: torch.cat(parts, 1), kernel_device)
    contenders = {"ours": captured(ours, kernel_device), "eager": plain}

    work = Work(bytes=2 * 2 * out.numel(), items=batch)
    compete(contenders, agree=equal, work=work)
