"""Pictures of a report: steps beside their roofline, contenders beside ours."""

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from bench.race import OURS
from bench.results import Report, Row


def save_pictures(report: Report, folder: Path) -> list[Path]:
    """Draw what the report has; nothing without matplotlib, which is said."""
    if not find_spec("matplotlib"):
        print("no pictures: matplotlib is not installed")
        return []
    import matplotlib as mpl

    mpl.use("Agg")
    drawn = []
    timed = [step for step in report.steps if "us" in step]
    for batch in sorted({step["batch"] for step in timed}):
        steps = [step for step in timed if step["batch"] == batch]
        drawn.append(_draw_steps(steps, f"YOLOv7, batch {batch}", folder / f"steps-{batch}.png"))
    if ratios := _ratios(report.rows):
        drawn.append(_draw_ratios(ratios, folder / "ratios.png"))
    return drawn


def _draw_steps(steps: Sequence[dict[str, Any]], title: str, path: Path) -> Path:
    """A bar for each step of the plan, and in it what the roofline allows."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(14, 5), layout="constrained")
    places = range(len(steps))
    axes.bar(places, [step["us"] for step in steps], color="tab:blue", label="measured")
    floor = [step["roofline_us"] for step in steps]
    axes.bar(places, floor, color="tab:orange", width=0.5, label="at the measured ceilings")
    labels = [f"{step['kind']} {step['shape']}"[:36] for step in steps]
    axes.set_xticks(places, labels, rotation=90, fontsize=5)
    axes.set(ylabel="microseconds", title=title)
    axes.legend()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Each baseline's time over ours, by suite, case and baseline."""
    ours = {(row.suite, row.case): row.p50_ms for row in rows if row.body == OURS and row.p50_ms}
    return {
        f"{row.suite} {row.case}: {row.body}": row.p50_ms / ours[row.suite, row.case]
        for row in rows
        if row.body != OURS and row.p50_ms and (row.suite, row.case) in ours
    }


def _draw_ratios(ratios: dict[str, float], path: Path) -> Path:
    """A bar for each baseline; left of 1 it is the faster one."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(9, 1.5 + 0.16 * len(ratios)), layout="constrained")
    values = list(ratios.values())
    colours = ["tab:green" if value > 1 else "tab:red" for value in values]
    axes.barh(range(len(values)), values, color=colours)
    axes.set_yticks(range(len(values)), list(ratios), fontsize=6)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set(xscale="log", xlabel="the baseline's time over ours")
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
