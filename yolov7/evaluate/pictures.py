"""Pictures of an evaluation; needs matplotlib, the optional extra `plots`."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from yolov7.atomic import atomic
from yolov7.evaluate.confusion import CONFIDENCE, IOU
from yolov7.evaluate.metric import Evaluation
from yolov7.text import plot_text

NAMED = 20  # classes up to which each gets a colour and a name


def save_pictures(evaluation: Evaluation, folder: Path) -> list[Path]:
    """Draw the confusion matrix and the curves.

    Args:
        evaluation: What to draw.
        folder: Where `confusion_matrix.png`, `PR_curve.png`, `F1_curve.png`, `P_curve.png` and
            `R_curve.png` are written; it exists.

    Returns:
        The files; of a data set without a single box only the matrix.
    """
    names = [plot_text(row.name) for row in evaluation.per_class]
    pictures = {"confusion_matrix": confusion_picture(evaluation.confusion, names)}
    curves = evaluation.curves
    if curves.names:
        by_confidence = {"F1": curves.f1, "P": curves.precision, "R": curves.recall}
        pictures["PR_curve"] = curve_picture(
            curves.recalls,
            curves.precision_at_recall,
            [
                f"{plot_text(row.name)} {row.ap50:.3f}"
                for row in evaluation.per_class
                if row.ap50 >= 0
            ],
            f"all classes, AP50 {evaluation.stats['AP50']:.3f}",
            ("recall", "precision"),
        )
        for letter, title in (("F1", "F1"), ("P", "precision"), ("R", "recall")):
            best = f"all classes, best F1 at {evaluation.confidence:.3f}"
            pictures[f"{letter}_curve"] = curve_picture(
                curves.confidences,
                by_confidence[letter],
                [plot_text(name) for name in curves.names],
                best,
                ("confidence", title),
                evaluation.confidence,
            )
    paths = []
    for name, figure in pictures.items():
        paths.append(folder / f"{name}.png")
        with atomic(paths[-1]) as temporary:
            figure.savefig(temporary, dpi=150)
    return paths


def curve_picture(
    x: NDArray[np.float64],
    curves: NDArray[np.float64],
    names: list[str],
    mean_name: str,
    axes_names: tuple[str, str],
    mark: float | None = None,
) -> Figure:
    """One curve for each class, thin, and their mean, thick.

    Args:
        x: [n] in 0..1.
        curves: [k, n] in 0..1.
        names: [k] for the legend, which shows them up to `NAMED`.
        mean_name: Legend of the mean.
        axes_names: Of x and y.
        mark: An x to point out.
    """
    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.add_subplot()
    named = len(names) <= NAMED
    for name, curve in zip(names, curves, strict=True):
        if named:
            axes.plot(x, curve, linewidth=1, label=name)
        else:
            axes.plot(x, curve, linewidth=0.5, color="lightgrey")
    axes.plot(x, curves.mean(0), linewidth=2.5, color="black", label=mean_name)
    if mark is not None:
        axes.axvline(mark, linewidth=1, linestyle=":", color="black")
    axes.set(xlim=(0, 1), ylim=(0, 1.02), xlabel=axes_names[0], ylabel=axes_names[1])
    axes.set_title(f"{axes_names[1]} by {axes_names[0]}, IoU 0.5")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize="small")
    return figure


def confusion_picture(matrix: NDArray[np.int64], names: list[str]) -> Figure:
    """The confusion matrix [nc + 1, nc + 1] as counts on colours by share of the true class."""
    labels = [*names, "background"]
    side = min(max(5.0, 0.5 * len(labels) + 3), 20)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.add_subplot()
    share = matrix / np.maximum(matrix.sum(0), 1)
    drawn = axes.imshow(
        np.ma.masked_equal(share, 0), cmap="Blues", norm=PowerNorm(0.5, 0, 1), aspect="equal"
    )
    figure.colorbar(drawn, ax=axes, shrink=0.7, label="share of the true class")
    if len(names) <= NAMED:
        _write_counts(axes, matrix, share)
    places, size = range(len(labels)), "small" if len(names) <= NAMED else 6
    axes.set_xticks(places, labels, rotation=90, fontsize=size)
    axes.set_yticks(places, labels, fontsize=size)
    axes.set_xlabel("true class (background: detected, but not there)")
    axes.set_ylabel("predicted class (background: missed)")
    axes.set_title(f"confidence {CONFIDENCE}, IoU {IOU}")
    return figure


def _write_counts(axes: Axes, matrix: NDArray[np.int64], share: NDArray[np.float64]) -> None:
    for row, column in np.argwhere(matrix):
        axes.text(
            column,
            row,
            str(matrix[row, column]),
            ha="center",
            va="center",
            fontsize="small",
            color="white" if share[row, column] > 0.3 else "black",
        )
