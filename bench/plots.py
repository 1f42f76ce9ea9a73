"""Pictures of a report: steps beside their roofline, contenders beside ours."""

from collections.abc import Sequence
from pathlib import Path

from bench.results import OURS, Report, Row
from yolov7.drawing import NO_PLOTS, can_plot


def save_pictures(report: Report, folder: Path) -> list[Path]:
    """Draw what the report has; nothing without matplotlib, which is said."""
    if not can_plot():
        print(f"note: {NO_PLOTS}")
        return []
    from matplotlib.figure import Figure

    from yolov7.benchmark.pictures import draw_steps

    drawn: dict[str, Figure] = {}
    timed = [step for step in report.steps if "us" in step]
    for batch in sorted({step["batch"] for step in timed}):
        steps = [step for step in timed if step["batch"] == batch]
        figure = drawn[f"steps-{batch}.png"] = Figure((14, 5), layout="constrained")
        draw_steps(figure.subplots(), steps, f"YOLOv7, batch {batch}")
    if ratios := _ratios(report.rows):
        height = 1.5 + 0.16 * len(ratios)
        figure = drawn["ratios.png"] = Figure((9, height), layout="constrained")
        axes = figure.subplots()
        colours = ["tab:green" if value > 1 else "tab:red" for value in ratios.values()]
        axes.barh(range(len(ratios)), list(ratios.values()), color=colours)
        axes.set_yticks(range(len(ratios)), list(ratios), fontsize=6)
        axes.invert_yaxis()
        axes.axvline(1.0, color="black", linewidth=1)
        axes.set(xscale="log", xlabel="the baseline's time over ours")
    for name, figure in drawn.items():
        figure.savefig(folder / name, dpi=130)
    return [folder / name for name in drawn]


def _ratios(rows: Sequence[Row]) -> dict[str, float]:
    """Each baseline's time over ours, by suite, case and baseline."""
    ours = {(row.suite, row.case): row.p50_ms for row in rows if row.body == OURS and row.p50_ms}
    return {
        f"{row.suite} {row.case}: {row.body}": row.p50_ms / ours[row.suite, row.case]
        for row in rows
        if row.body != OURS and row.p50_ms and (row.suite, row.case) in ours
    }
