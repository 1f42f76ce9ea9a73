"""Pictures of a run: its training batches, and with matplotlib its labels and its course."""

import math
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolov7.atomic import atomic
from yolov7.dataset import Dataset
from yolov7.drawing import draw_boxes
from yolov7.evaluate.sheet import draw_sheet
from yolov7.letterbox import GREY, Image
from yolov7.results import write_image
from yolov7.runs import write_arguments
from yolov7.text import plot_text
from yolov7.train.loader import Batch
from yolov7.train.meter import LOSSES
from yolov7.train.report import Callback, CsvWriter, Result, TensorBoard, read_rows
from yolov7.train.validation import Validation

SHOWN = 16  # images of a batch
CURVES = ("box", "objectness", "classes", "lr", "AP", "AP50", "precision", "recall")
COURSE = "results.png"  # of the whole run


def batch_picture(batch: Batch, names: list[str]) -> Image:
    """The first images of a batch side by side, with their boxes, BGR."""
    images = batch.images[:SHOWN].numpy()
    count, _, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    sheet = np.full((-(-count // columns) * height, columns * width, 3), GREY, np.uint8)
    for i, (image, labels) in enumerate(zip(images, batch.labels.numpy(), strict=False)):
        y, x = i // columns * height, i % columns * width
        labels = labels[labels[:, 0] >= 0]
        half = labels[:, 3:] / 2
        boxes = np.concatenate([labels[:, 1:3] - half, labels[:, 1:3] + half], 1)
        classes = labels[:, 0].astype(int).tolist()
        sheet[y : y + height, x : x + width] = draw_boxes(
            np.ascontiguousarray(image[::-1].transpose(1, 2, 0)),
            boxes * np.array([width, height, width, height], np.float32),
            [names[c] for c in classes],
            classes,
        )
    return sheet


def save_batch(batch: Batch, names: list[str], path: Path) -> None:
    """Write `batch_picture` as JPEG."""
    write_image(path, batch_picture(batch, names))


def label_picture(dataset: Dataset, path: Path) -> None:
    """How many boxes of which class there are, where they lie and how large they are."""
    from matplotlib.figure import Figure

    classes = np.concatenate([sample.labels.classes for sample in dataset.samples])
    boxes = np.concatenate(
        [s.labels.boxes / np.array([s.width, s.height] * 2, np.float32) for s in dataset.samples]
    )
    centre, size = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]
    figure = Figure(figsize=(15, 5), layout="constrained")
    counts, places, sizes = figure.subplots(1, 3)
    counts.bar(range(len(dataset.names)), np.bincount(classes, minlength=len(dataset.names)))
    counts.set_ylabel("boxes")
    if len(dataset.names) <= 30:
        names = [plot_text(name) for name in dataset.names]
        counts.set_xticks(range(len(names)), names, rotation=90)
    for axes, points, sides in (
        (places, centre, ("centre x", "centre y")),
        (sizes, size, ("width", "height")),
    ):
        axes.hist2d(points[:, 0], points[:, 1], bins=50, range=((0, 1), (0, 1)), cmin=1)
        axes.set(xlabel=f"{sides[0]} / image", ylabel=f"{sides[1]} / image", aspect="equal")
    places.invert_yaxis()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def results_picture(csv: Path, path: Path) -> None:
    """The columns of results.csv over the epochs."""
    from matplotlib.figure import Figure

    rows = read_rows(csv)
    figure = Figure(figsize=(16, 8), layout="constrained")
    epochs = [row["epoch"] for row in rows]
    for axes, name in zip(figure.subplots(2, 4).flat, CURVES, strict=True):
        for column, label in ((name, "training"), (f"val_{name}", "validation")):
            values: NDArray[np.float64] = np.array([row.get(column, np.nan) for row in rows])
            known = np.isfinite(values)
            if known.any():
                axes.plot(np.array(epochs)[known], values[known], label=label, marker=".")
        axes.set(title=name, xlabel="epoch")
        if name in LOSSES:
            axes.legend()
    with atomic(path) as temporary:
        figure.savefig(temporary, dpi=100)


def evaluation_pictures(validation: Validation, folder: Path) -> None:
    """The curves, the confusion matrix, and images with what was found in them."""
    from yolov7.evaluate.pictures import save_pictures

    evaluation, found, _ = validation
    save_pictures(evaluation, folder)
    sheet = draw_sheet(found.dataset.samples, found.detections, found.dataset.names)
    write_image(folder / "samples.jpg", sheet)


class Plotter(Callback):
    """Draws the labels at the start and the course of the run at the end.

    Args:
        folder: of the run.
        dataset: the images trained on.
    """

    def __init__(self, folder: Path, dataset: Dataset) -> None:
        self.folder = folder
        label_picture(dataset, folder / "labels.png")

    def on_end(self, result: Result) -> None:  # noqa: ARG002  # the callback's signature
        """Draw."""
        results_picture(self.folder / "results.csv", self.folder / COURSE)


def own_callbacks(
    folder: Path, settings: dict[str, Any], dataset: Dataset, epochs: int, *, plots: bool
) -> list[Callback]:
    """Those that fill a run's folder; what the run was told is written there at once.

    Args:
        folder: of the run.
        settings: what it was told.
        dataset: the images trained on.
        epochs: that are done.
        plots: whether pictures are drawn, too.
    """
    write_arguments(folder, settings)
    callbacks: list[Callback] = [CsvWriter(folder / "results.csv", epochs)]
    if plots:
        callbacks.append(Plotter(folder, dataset))
    if find_spec("tensorboard"):
        callbacks.append(TensorBoard(folder))
    return callbacks
