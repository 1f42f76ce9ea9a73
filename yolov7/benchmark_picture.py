"""The picture of a benchmark: stage bars and, where steps were timed, their roofline."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from yolov7.benchmark import Timing


def draw(timings: list[Timing], folder: Path) -> Path:
    """Draw the medians of the stages, and each step of a plan against the device's ceilings.

    Args:
        timings: One per engine.
        folder: Where `bench.png` is written.
    """
    planned = [t for t in timings if t.steps]
    figure = Figure((7 * (1 + len(planned)), 4), layout="constrained")
    axes = figure.subplots(1, 1 + len(planned), squeeze=False)[0]
    _bars(axes[0], timings)
    for ax, timing in zip(axes[1:], planned, strict=True):
        _roofline(ax, timing)
    path = folder / "bench.png"
    figure.savefig(path, dpi=120)
    return path


def _bars(ax: Axes, timings: list[Timing]) -> None:
    stages = list(dict.fromkeys(s for t in timings for s in t.samples if s != "whole"))
    left = np.zeros(len(timings))
    names = [t.engine for t in timings]
    for stage in stages:
        widths = np.array([np.median(t.samples.get(stage, [0.0])) for t in timings])
        ax.barh(names, widths, left=left, label=stage)
        left += widths
    whole = [float(np.median(t.samples["whole"])) for t in timings]
    ax.plot(whole, names, "k|", markersize=24, label="whole, undivided")
    ax.set_xlabel(f"ms per batch of {timings[0].batch}, 1080p frames")
    ax.legend(fontsize="small")


def _roofline(ax: Axes, timing: Timing) -> None:
    intensity = np.array([s["flops"] / s["bytes"] for s in timing.steps])
    rate = np.array([s["flops"] / s["ms"] * 1e3 for s in timing.steps])
    span = np.geomspace(max(intensity.min(), 0.1), intensity.max() * 2, 100)
    ax.loglog(span, np.minimum(span * timing.bandwidth, timing.ceiling), "k-", linewidth=1)
    for kind in sorted({s["kernel"] for s in timing.steps}):
        chosen = np.array([s["kernel"] == kind for s in timing.steps])
        ax.loglog(intensity[chosen], rate[chosen], "o", markersize=4, label=kind)
    ax.set_xlabel("FLOP per byte")
    ax.set_ylabel("FLOP/s")
    ax.set_title(f"steps of the plan, {timing.engine}", fontsize="medium")
    ax.legend(fontsize="small")
