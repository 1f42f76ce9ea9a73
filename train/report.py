"""What a run tells: results.csv, TensorBoard, a user's callbacks, the line of an epoch."""

import csv
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yolov7.dataset import Dataset
from yolov7.model import YOLOv7
from yolov7.train.distributed import Ranks
from yolov7.train.loader import Batch
from yolov7.train.meter import LOSSES
from yolov7.train.step import Progress
from yolov7.train.validation import Validation


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Args:
        folder: of the run.
        epochs: that were finished, those before a resumption included.
        best_epoch: epoch of the best evaluation, from 1; 0: there was none.
        fitness: of that evaluation, 0.1 AP50 + 0.9 AP.
        stats: of the best weights, on the images evaluated on.
        test: likewise, on those of the test split; empty: there is none.
        hours: in training and evaluation.
        stopped: why the run ended.
    """

    folder: Path
    epochs: int
    best_epoch: int
    fitness: float
    stats: dict[str, float]
    test: dict[str, float]
    hours: float
    stopped: str

    @classmethod
    def of(
        cls, folder: Path, progress: Progress, found: dict[str, Validation], stopped: str
    ) -> "Result":
        """How a run ended that came so far, with what was found on `val` and perhaps on `test`."""
        return cls(
            folder=folder,
            epochs=progress.epoch,
            best_epoch=progress.best_epoch,
            fitness=progress.best,
            stats=found["val"].stats,
            test=found["test"].evaluation.stats if "test" in found else {},
            hours=progress.seconds / 3600,
            stopped=stopped,
        )


class Callback:
    """Something that follows a run; override what is of interest. Called on the main process.

    Attributes:
        stop: why the run is to end with the epoch that is going on; empty: it is not. Said in
            `on_epoch` without an evaluation, it ends with the next one, which has one.
    """

    stop = ""

    def on_start(self, folder: Path, options: dict[str, Any], model: YOLOv7) -> None:
        """The run's folder exists, training begins; it changes `model` in place."""

    def on_batch(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        """A batch has been learnt from; `terms` are its unweighted losses, on the device."""

    def on_epoch(self, row: dict[str, float], validation: Validation | None) -> None:
        """An epoch has ended; `row` is its line of results.csv."""

    def on_end(self, result: Result) -> None:
        """The run has ended by itself."""


class CsvWriter(Callback):
    """Writes `results.csv`.

    Args:
        path: of the file.
        epochs: rows that are kept of a file that is there (resumption).
    """

    def __init__(self, path: Path, epochs: int) -> None:
        self.path = path
        if not epochs:
            path.unlink(missing_ok=True)
        elif path.exists():
            # Cut, not written anew: neither a full disk nor a kill can take the rows that stay.
            rows = path.read_bytes().splitlines(keepends=True)
            os.truncate(path, sum(map(len, rows[: 1 + epochs])))

    def on_epoch(
        self,
        row: dict[str, float],
        validation: Validation | None,  # noqa: ARG002  # the callback's signature
    ) -> None:
        """Append a row."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow({k: "" if v != v else f"{v:.6g}" for k, v in row.items()})  # NaN


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a results.csv; NaN where an epoch has no value, no rows without the file.

    A row that is not made of numbers, or of another length than the first line, is left out.
    """
    if not path.is_file():
        return []
    names, *rows = [line.split(",") for line in path.read_text(errors="replace").splitlines()] or [
        []
    ]
    read = []
    for row in rows:
        with suppress(ValueError):
            cells = zip(names, row, strict=True)
            read.append({name: float(cell) if cell else float("nan") for name, cell in cells})
    return read


class TensorBoard(Callback):
    """Writes the rows for TensorBoard, where it is installed."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder))

    def on_epoch(
        self,
        row: dict[str, float],
        validation: Validation | None,  # noqa: ARG002  # the callback's signature
    ) -> None:
        """Add the numbers of an epoch."""
        for name, value in row.items():
            if value == value:  # NaN
                self.writer.add_scalar(name, value, int(row["epoch"]))

    def on_end(self, result: Result) -> None:  # noqa: ARG002  # the callback's signature
        """Close the file."""
        self.writer.close()


def header(
    model: YOLOv7, train: Dataset, val: Dataset, dtype: torch.dtype, ranks: Ranks
) -> Iterator[str]:
    """What is trained, where and on what, in lines."""
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    device = model.head.anchors.device
    cuda = device.type == "cuda"
    where = torch.cuda.get_device_name(device) if cuda else str(device)
    where = f"{ranks.world} x {where}" if ranks.world > 1 else where
    precision = str(dtype).removeprefix("torch.")
    yield f"{model.variant.name}, {parameters:.1f} M parameters, on {where} in {precision}"
    boxes = [len(sample.labels.classes) for sample in train.samples]
    yield (
        f"{len(boxes)} images of {model.imgsz} pixels ({boxes.count(0)} without boxes), "
        f"{sum(boxes)} boxes of {len(model.names)} classes; evaluated on {len(val.samples)} images"
    )


def epoch_line(row: dict[str, float], epochs: int) -> str:
    """The line that is printed for an epoch."""
    losses = ", ".join(f"{name} {row[name]:.4f}" for name in LOSSES)
    parts = [f"epoch {int(row['epoch'])}/{epochs}: {losses}, lr {row['lr']:.5f}"]
    if row["AP"] == row["AP"]:  # NaN: not evaluated
        parts.append(f"AP {row['AP']:.4f}, AP50 {row['AP50']:.4f}")
    parts.append(f"{row['images_per_s']:.0f} images/s, {row['waiting']:.0%} waiting for data")
    if row["skipped"]:
        parts.append(f"{int(row['skipped'])} steps skipped")
    if row["overflow"]:
        parts.append(f"{row['overflow']:.0f} candidates without a slot")
    return "; ".join(parts)
