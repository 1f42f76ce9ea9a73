"""Pictures of what was timed: stages, and each step of a plan beside its roofline."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from yolov7.atomic import atomic
from yolov7.benchmark.stages import Timing


def draw(timings: list[Timing], folder: Path) -> Path:
    """Draw the medians of the stages, and the steps where a plan was timed.

    Args:
        timings: One per engine.
        folder: Where `bench.png` is written.
    """
    planned = [t for t in timings if t.steps]
    figure = Figure((14 if planned else 7, 4 + 5 * len(planned)), layout="constrained")
    axes = figure.subplots(1 + len(planned), 1, squeeze=False)[:, 0]
    _draw_stages(axes[0], timings)
    for ax, timing in zip(axes[1:], planned, strict=True):
        draw_steps(ax, timing.steps, f"steps of the plan, {timing.engine}, batch {timing.batch}")
    path = folder / "bench.png"
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def _draw_stages(ax: Axes, timings: list[Timing]) -> None:
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


def draw_steps(ax: Axes, steps: Sequence[dict[str, Any]], title: str) -> None:
    """A bar for each step, as `step_timers` has them, and in it what the roofline allows."""
    places = range(len(steps))
    ax.bar(places, [step["us"] for step in steps], color="tab:blue", label="measured")
    floor = [step["roofline_us"] for step in steps]
    ax.bar(places, floor, color="tab:orange", width=0.5, label="at the measured ceilings")
    labels = [f"{step['kind']} {step['shape']}"[:36] for step in steps]
    ax.set_xticks(places, labels, rotation=90, fontsize=5)
    ax.set(ylabel="microseconds", title=title)
    ax.legend()
