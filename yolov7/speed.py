"""How long each stage takes per image."""

from collections import deque
from collections.abc import Mapping

import numpy as np

KEPT = 10_000  # latest images that the percentiles are taken from


class Speed:
    """Milliseconds per image by stage, over the latest images.

    Attributes:
        images: How many there were in all.
    """

    def __init__(self) -> None:
        self.images = 0
        self._samples: dict[str, deque[float]] = {}
        self._total: deque[float] = deque(maxlen=KEPT)

    def add(self, stages: Mapping[str, float]) -> None:
        """Count one image that took ``stages`` milliseconds; an engine has its own stages."""
        self.images += 1
        for stage, ms in stages.items():
            if stage not in self._samples:
                self._samples[stage] = deque(maxlen=KEPT)
            self._samples[stage].append(ms)
        self._total.append(sum(stages.values()))

    def summary(self) -> dict[str, dict[str, float]]:
        """Stage ("pre", "network" and "nms", or "whole"; "total") -> "p50" and "p99" in ms."""
        if not self.images:
            return {}
        return {
            stage: dict(
                zip(("p50", "p99"), np.percentile(samples, (50, 99)).round(3).tolist(), strict=True)
            )
            for stage, samples in {**self._samples, "total": self._total}.items()
        }

    def __str__(self) -> str:
        """One line: `speed per image (p50/p99 ms): pre 1.2/1.5, ...; 24.1 images/s`."""
        summary = self.summary()
        if not summary:
            return "speed: no image"
        stages = ", ".join(f"{name} {s['p50']:.1f}/{s['p99']:.1f}" for name, s in summary.items())
        rate = 1e3 / max(summary["total"]["p50"], 1e-3)
        return f"speed per image (p50/p99 ms): {stages}; {rate:.1f} images/s"
