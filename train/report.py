"""What a run tells: the progress of an epoch, results.csv, TensorBoard, a user's callbacks."""

import csv
import os
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

if TYPE_CHECKING:
    from collections.abc import Iterable

    from yolov7.train.validation import Validation

T = TypeVar("T")
REFRESH_S = 1.0  # between updates of the bar, each of which reads the losses from the device


@dataclass(frozen=True)
class Result:
    """How a run ended.

    Args:
        folder: of the run.
        epochs: that were finished, those before a resumption included.
        best_epoch: epoch of the best evaluation, from 1; 0: there was none.
        fitness: of that evaluation, 0.1 AP50 + 0.9 AP.
        stats: of the last evaluation.
        hours: in training and evaluation.
        stopped: why the run ended.
    """

    folder: Path
    epochs: int
    best_epoch: int
    fitness: float
    stats: dict[str, float]
    hours: float
    stopped: str


class Callback:
    """Something that follows a run; override what is of interest. Called on the main process."""

    def on_start(self, folder: Path, options: dict[str, Any]) -> None:
        """The run's folder exists, training begins."""

    def on_epoch(self, row: dict[str, float], validation: "Validation | None") -> None:
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
        validation: "Validation | None",  # noqa: ARG002  # the callback's signature
    ) -> None:
        """Append a row."""
        new = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            if new:
                writer.writeheader()
            writer.writerow({k: "" if v != v else f"{v:.6g}" for k, v in row.items()})  # NaN


def read_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a results.csv; NaN where an epoch has no value, no rows without the file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return [
            {name: float(value) if value else float("nan") for name, value in row.items()}
            for row in csv.DictReader(file)
        ]


class TensorBoard(Callback):
    """Writes the rows for TensorBoard, where it is installed."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer: Any = SummaryWriter(str(folder))

    def on_epoch(
        self,
        row: dict[str, float],
        validation: "Validation | None",  # noqa: ARG002  # the callback's signature
    ) -> None:
        """Add the numbers of an epoch."""
        for name, value in row.items():
            if value == value:  # NaN
                self.writer.add_scalar(name, value, int(row["epoch"]))

    def on_end(self, result: Result) -> None:  # noqa: ARG002  # the callback's signature
        """Close the file."""
        self.writer.close()


@dataclass
class Meter:
    """Losses and times of one epoch, and its progress bar.

    Args:
        title: of the bar.
        batches: that the epoch has.
        show: whether to draw the bar (where standard error is a terminal).
    """

    title: str
    batches: int
    show: bool = True
    images: int = 0
    waited: float = 0.0  # seconds for data
    seconds: float = 0.0
    sums: dict[str, Tensor] = field(default_factory=dict)
    done: int = 0

    def follow(self, loader: "Iterable[T]") -> Iterator[T]:
        """Pass the batches on, timing them."""
        console = Console(stderr=True)
        shown = self.show and console.is_terminal
        text = (TextColumn("{task.description}"), BarColumn(None), MofNCompleteColumn())
        columns = (*text, TimeRemainingColumn(), TextColumn("{task.fields[state]}"))
        bar = Progress(*columns, console=console, transient=True, expand=True)
        start = refreshed = time.perf_counter()
        with bar if shown else nullcontext():
            task = bar.add_task(self.title, total=self.batches, state="")
            batches = iter(loader)
            while True:
                asked = time.perf_counter()
                batch = next(batches, None)
                now = time.perf_counter()
                self.waited += now - asked
                self.seconds = now - start
                if batch is None:
                    break
                yield batch
                self.done += 1
                if shown and time.perf_counter() - refreshed > REFRESH_S:
                    refreshed = time.perf_counter()
                    bar.update(task, completed=self.done, state=self._state())

    def add(self, values: dict[str, Tensor], images: int) -> None:
        """Take in the figures of a batch; nothing is read from the device."""
        self.images += images
        for name, value in values.items():
            value = value.detach().float()
            self.sums[name] = self.sums[name] + value if name in self.sums else value

    def row(self) -> dict[str, float]:
        """Means over the batches, images per second, share of time spent waiting, memory."""
        means = {k: float(v) / max(self.done, 1) for k, v in self.sums.items()}  # synchronises
        return {
            **means,
            "images_per_s": self.images / max(self.seconds, 1e-9),
            "waiting": self.waited / max(self.seconds, 1e-9),
            "memory_gb": peak_memory() / 1e9,
        }

    def _state(self) -> str:
        row = self.row()
        losses = " ".join(f"{name} {row[name]:.4f}" for name in self.sums if name in LOSSES)
        return (
            f"{losses} {row['images_per_s']:.0f} images/s, {row['waiting']:.0%} waiting for data, "
            f"{row['memory_gb']:.1f} GB"
        )


LOSSES = ("box", "objectness", "classes")
SUMMED = ("matches", "overflow", "images_per_s")  # over ranks; of the rest the mean is taken


def merged(rows: list[dict[str, float]]) -> dict[str, float]:
    """One row of the rows of all ranks."""
    return {
        name: sum(row[name] for row in rows) / (1 if name in SUMMED else len(rows))
        for name in rows[0]
    }


def peak_memory() -> float:
    """Bytes: of the GPU's memory where one is used, else of this process's."""
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return float(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


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
