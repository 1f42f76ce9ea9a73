"""The clock, what a turn has to do, and turns by the clock.

By turns, because a machine drifts: what slows it down for a second slows all contenders alike, and
the ratio of their medians stays. On CUDA a turn lies between two events, with the L2 cache flushed
before it; while the flush runs the host has time to enqueue the turn, so launch latency is not
measured unless the contender's own host work is longer than that. Elsewhere a turn is timed by
`time.perf_counter`.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

Run = Callable[[], Any]

FLUSHED = 256 << 20  # bytes written between turns: four times the L2 cache of an H200


@dataclass(frozen=True)
class Work:
    """What a turn has to do at the least.

    Attributes:
        flops: Two per multiply-add.
        bytes: Each input read once, each output written once.
        dtype: That the multiplications are in, for the ceiling.
        items: Images, where images per second are of interest.
    """

    flops: float = 0.0
    bytes: float = 0.0
    dtype: torch.dtype = torch.float32
    items: int = 0


@dataclass(frozen=True)
class Pace:
    """How long a comparison may take.

    Attributes:
        seconds: For all its turns, set-up and check apart.
        least: Turns of each contender, even beyond that time; three if that takes thrice as long.
        most: Turns of each contender.
    """

    seconds: float = 4.0
    least: int = 5
    most: int = 300


class Clock:
    """Seconds that a call takes on a device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @cached_property
    def _scratch(self) -> Tensor:
        return torch.empty(FLUSHED, dtype=torch.uint8, device=self.device)

    def __call__(self, run: Run) -> float:
        """Time one call: of the device's work on CUDA, else of the host's."""
        self.prepare()
        before = self.now()
        run()
        return self.now() - before

    def whole(self, run: Run) -> float:
        """Time one call by the host's clock, from an idle device until it is idle again."""
        self.wait()
        start = time.perf_counter()
        run()
        self.wait()
        return time.perf_counter() - start

    def prepare(self) -> None:
        """What stands before a turn: on CUDA, flush the L2 cache."""
        if self.device.type == "cuda":
            self._scratch.zero_()

    def now(self) -> Any:
        """A point in time; what lies between two is their difference in seconds."""
        if self.device.type != "cuda":
            self.wait()
            return time.perf_counter()
        return Mark(self.device)

    def wait(self) -> None:
        """Until the device is idle."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)


class Mark:
    """A point in time on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self.event = torch.cuda.Event(enable_timing=True)
        with torch.cuda.device(device):
            self.event.record()

    def __sub__(self, earlier: "Mark") -> float:
        """Seconds since another."""
        self.event.synchronize()
        return earlier.event.elapsed_time(self.event) / 1e3


def race(
    runs: Mapping[str, Run], clock: Callable[[Run], float], pace: Pace
) -> dict[str, list[float]]:
    """Seconds of each contender's turns; all have the same number of turns."""
    turns: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        clock(run)  # once, so that everything is in place
    started = time.perf_counter()
    for turn in range(pace.most):
        spent = time.perf_counter() - started
        enough = pace.least if spent < 3 * pace.seconds else min(3, pace.least)
        if turn >= enough and spent > pace.seconds:
            break
        for name, run in runs.items():
            turns[name].append(clock(run))
    return turns


def captured(run: Run, device: torch.device) -> Run:
    """On CUDA a graph of `run` to replay: what its kernels take without the host's launches."""
    if device.type != "cuda":
        return run
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # whatever is compiled or allocated once
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay


def percentiles(times: list[float], *shares: float) -> list[float]:
    """Percentiles of milliseconds, rounded to a tenth of a microsecond."""
    return [round(float(value), 4) for value in np.percentile(times, shares)]
