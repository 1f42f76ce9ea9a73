"""Ranges of the feature maps, for fp8 and int8.

e4m3 has 3 bits of mantissa and 4 of exponent: within 2^-6 to 448 of its scale, the relative error
is that of the mantissa; below, steps are absolute; above, values saturate. int8 has 127 equal steps
to either side. A map's range is the magnitude that becomes 448, or 127. The one chosen makes the
error over the calibration images least, by its `POWER`: a few outliers do not cost everything else
its resolution, and yet count for more than by the square, which lost twice the AP in int8.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from yolov7.engine.graph.planned import PlannedNetwork
from yolov7.kernels.conv import LARGEST
from yolov7.kernels.conv.layer import to_dtype
from yolov7.model import YOLOv7

BINS = 4096
CLIPS = tuple(0.5 ** (i / 4) for i in range(13))  # candidates: 1 to 1/8 of the largest magnitude
POWER = 2.4  # of the error; from 2.4 to 4 the AP is the same
JUDGED = 2  # batches on which the first map's share of the error is measured
STEM_MATTERS = 0.9  # the first map stays higher if that leaves at most this share of the error


class Histogram:
    """Magnitudes of a map; the bins double in width when a larger value comes."""

    def __init__(self) -> None:
        self.limit = 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Count `values` of any shape."""
        magnitudes = values.float().abs().flatten()
        largest = float(magnitudes.max())
        if self.limit == 0:
            self.limit = largest
        while largest > self.limit > 0:
            self.counts = torch.cat([self.counts.view(-1, 2).sum(1), torch.zeros(BINS // 2)])
            self.limit *= 2
        if self.limit > 0:
            self.counts += torch.histc(magnitudes, BINS, 0, self.limit)

    def range(self, dtype: torch.dtype) -> float:
        """The magnitude that is best made the largest of a type of 8 bits."""
        if self.limit == 0:
            return 1.0
        width = self.limit / BINS
        centres = (torch.arange(BINS, dtype=torch.float32) + 0.5) * width
        last = int(self.counts.nonzero().max()) + 1
        best = min((c * last * width for c in CLIPS), key=lambda r: self._error(centres, r, dtype))
        return float(best)

    def _error(self, centres: Tensor, limit: float, dtype: torch.dtype) -> float:
        scale = limit / LARGEST[dtype]
        back = to_dtype(centres, dtype, scale).float() * scale
        return float((self.counts * (back - centres).double().abs() ** POWER).sum())


@torch.no_grad()
def calibrate(
    model: YOLOv7, batches: Iterable[Tensor], dtype: torch.dtype = torch.float8_e4m3fn
) -> dict[str, float]:
    """Ranges of a model's maps, by the names that its plan gives them.

    The maps that the head reads and those of the pyramid's pools stay in the higher precision
    anyway; the first one does where its rounding dominates the error of the whole.

    Args:
        model: in fused form, fp32, on the CPU.
        batches: [B, 3, H, W] each, RGB in 0..1, all of one shape.
        dtype: fp8 e4m3 or int8.

    Raises:
        ValueError: no batch, or batches of several shapes.
    """
    images: Sequence[Tensor] = list(batches)
    shapes = {tuple(x.shape) for x in images}
    if len(shapes) != 1:
        raise ValueError(f"calibration needs batches of one shape, got {sorted(shapes)}")
    batch, _, height, width = shapes.pop()

    def planned(ranges: dict[str, float] | None) -> PlannedNetwork:
        return PlannedNetwork(
            model,
            batch,
            height,
            width,
            dtype=torch.float32,
            device=torch.device("cpu"),
            ranges=ranges,
            narrow=dtype,
        )

    exact = planned(None)
    histograms: dict[str, Histogram] = {}
    wanted = []
    for x in images:
        exact.images.copy_(x)
        exact.run(lambda name, y: histograms.setdefault(name, Histogram()).add(y))
        wanted.append([y.clone() for y in exact.features])
    ranges = {name: histogram.range(dtype) for name, histogram in histograms.items()}

    def error(candidate: dict[str, float]) -> float:
        network, total = planned(candidate), 0.0
        for x, features in zip(images[:JUDGED], wanted, strict=False):
            network.images.copy_(x)
            network.run()
            pairs = zip(network.features, features, strict=True)
            total += sum(float((a - b).square().mean() / b.square().mean()) for a, b in pairs)
        return total

    stem = exact.plan.steps[0].tasks[0].outputs[0].name
    without = {name: limit for name, limit in ranges.items() if name != stem}
    return without if error(without) <= STEM_MATTERS * error(ranges) else ranges
