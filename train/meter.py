"""Losses and times of an epoch: its progress bar, and its row of results.csv."""

import math
import time
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from yolov7.benchmark.memory import peak_bytes

T = TypeVar("T")
REFRESH_S = 1.0  # between updates of the bar, each of which reads the losses from the device
LOSSES = ("box", "objectness", "classes")
SUMMED = ("matches", "overflow", "images_per_s")  # over ranks; of the rest the mean is taken


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

    def follow(self, loader: Iterable[T]) -> Iterator[T]:
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
        memory = row["memory_gb"]
        return (
            f"{losses} {row['images_per_s']:.0f} images/s, {row['waiting']:.0%} waiting for data"
            + ("" if math.isnan(memory) else f", {memory:.1f} GB")
        )


def merged(rows: list[dict[str, float]]) -> dict[str, float]:
    """One row of the rows of all ranks."""
    return {
        name: sum(row[name] for row in rows) / (1 if name in SUMMED else len(rows))
        for name in rows[0]
    }


def peak_memory() -> float:
    """Bytes: of the GPU's memory where one is used, else of this process's; NaN: not known."""
    used = torch.cuda.is_available() and torch.cuda.max_memory_allocated()
    peak = peak_bytes(torch.device("cuda" if used else "cpu"))
    return math.nan if peak is None else float(peak)
