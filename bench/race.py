"""Contenders of one comparison, checked against each other, then timed by turns.

By turns, because a machine drifts: what slows it down for a second slows all contenders alike, and
the ratio of their medians stays. On CUDA a turn lies between two events, with the L2 cache flushed
before it; while the flush runs the host has time to enqueue the turn, so launch latency is not
measured unless the contender's own host work is longer than that. Elsewhere a turn is timed by
`time.perf_counter`.
"""

import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], Any]
Agree = Callable[[Any, Any], None]

OURS = "ours"
FLUSHED = 256 << 20  # bytes written between turns: four times the L2 cache of an H200


@dataclass(frozen=True)
class Missing:
    """A contender that cannot take part, and why."""

    reason: str


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


SMOKE = Pace(0.0, 1, 1)


class Clock:
    """Seconds that a call takes on a device."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"
        if self.cuda:
            self._scratch = torch.empty(FLUSHED, dtype=torch.uint8, device=device)

    def __call__(self, run: Run) -> float:
        """Time one call: of the device's work on CUDA, else of the host's."""
        if not self.cuda:
            return self.whole(run)
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self._scratch.zero_()
        before.record()
        run()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1e3

    def busy(self, run: Run) -> float:
        """Time one call: as `__call__` on CUDA, else of the processors, child processes included.

        What else runs on the machine does not count, nor does waiting.
        """
        if self.cuda:
            return self(run)
        start = _processor_seconds()
        run()
        return _processor_seconds() - start

    def whole(self, run: Run) -> float:
        """Time one call by the host's clock, from an idle device until it is idle again."""
        if self.cuda:
            torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter() - start


def _processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def race(
    runs: Mapping[str, Run], clock: Callable[[Run], float], pace: Pace
) -> dict[str, list[float]]:
    """Seconds of each contender's turns; all have the same number of turns."""
    turns: dict[str, list[float]] = {name: [] for name in runs}
    for name in runs if pace is not SMOKE else ():
        clock(runs[name])  # the check was the first call, this one finds everything in place
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


def close(rms: float) -> Agree:
    """A check of tensors, or sequences of them: relative root mean square of the difference.

    Args:
        rms: The largest that passes; NaN never does.
    """

    def agree(actual: Any, expected: Any) -> None:
        if not isinstance(actual, Tensor):
            for one, other in zip(actual, expected, strict=True):
                agree(one, other)
            return
        assert actual.shape == expected.shape, f"{actual.shape} is not {expected.shape}"
        a, b = actual.double(), expected.double()
        error = float((a - b).square().mean().sqrt() / b.square().mean().sqrt().clamp_min(1e-12))
        assert error <= rms, f"relative RMS {error:.2g} > {rms:.2g}"

    return agree


def equal(actual: Any, expected: Any) -> None:
    """A check: the same values exactly."""
    if isinstance(actual, Tensor):
        assert torch.equal(actual, expected)
    elif isinstance(actual, (tuple, list)):
        for one, other in zip(actual, expected, strict=True):
            equal(one, other)
    else:
        assert actual == expected, f"{actual} is not {expected}"
