"""What a suite says: which contenders, how they must agree, what work they do.

A benchmark is a pytest function `bench_*` with the fixture `compete`, which it calls once. Ours is
timed by pytest-benchmark, whose statistics, storage and options (`--benchmark-json`,
`--benchmark-compare`) hold for it; each of its rounds follows one turn of every other contender,
whose medians stand in its `extra_info`.
"""

import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from bench.results import OURS, Row
from yolov7.benchmark.ceilings import Ceilings
from yolov7.benchmark.clock import Run, Work


@dataclass(frozen=True)
class Missing:
    """A contender that cannot take part, and why."""

    reason: str


Contenders = Mapping[str, Run | Missing]
Agree = Callable[[Any, Any], None]

LEAST, MOST = 5, 300  # turns of each contender

ROWS = pytest.StashKey[list[Row]]()
CEILINGS = pytest.StashKey[Ceilings]()


def identify(item: pytest.Item) -> tuple[str, str]:
    """Suite and case of a benchmark."""
    suite, _, case = item.name.partition("[")
    return suite.removeprefix("bench_"), case.removesuffix("]")


def report(config: pytest.Config, rows: list[Row]) -> None:
    """Note rows for the table, and in the file that `--rows` names."""
    config.stash[ROWS].extend(rows)
    if path := config.getoption("--rows"):
        with path.open("a") as file:
            file.write("".join(row.as_line() for row in rows))


class Comparison:
    """The fixture `compete`: check contenders against each other, time them, report them.

    Args:
        request: Of the benchmark.
        benchmark: The fixture of pytest-benchmark.
    """

    def __init__(self, request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> None:
        self.benchmark = benchmark
        self.config = request.config
        self.name = request.node.nodeid
        self.suite, self.case = identify(request.node)
        self.ceilings = request.config.stash[CEILINGS]

    def __call__(
        self,
        contenders: Contenders,
        *,
        agree: Agree | None,
        work: Work | None = None,
        whole: bool = False,
    ) -> None:
        """Report every contender.

        Args:
            contenders: The functions to time, by name, ours among them.
            agree: Compares the result of each with ours; None where there is nothing to compare.
            work: What has to be done at the least.
            whole: On CUDA too, time from call to result by the host's clock.
        """
        clock: Callable[[Run], float] = self.ceilings.clock
        clock = self.ceilings.clock.whole if whole else clock
        turns = self.config.pluginmanager.get_plugin("turns")
        if turns is not None:
            ours = contenders[OURS]
            assert not isinstance(ours, Missing), ours.reason
            turns.take(self.name, ours, clock if self.ceilings.device.type == "cuda" else None)
            return
        present = {name: run for name, run in contenders.items() if not isinstance(run, Missing)}
        _check(present, agree)
        seconds = self._race(present, clock, whole)
        rows = [self._row(name, run, seconds, work or Work()) for name, run in contenders.items()]
        report(self.config, rows)

    def _race(
        self, runs: Mapping[str, Run], clock: Callable[[Run], float], whole: bool
    ) -> dict[str, list[float]]:
        """Seconds of each contender's turns; all have the same number of turns."""
        others = {name: run for name, run in runs.items() if name != OURS}
        times: dict[str, list[float]] = {name: [] for name in others}
        run, wait = runs[OURS], self.ceilings.clock.wait
        rounds = 1
        if not self.config.getoption("--smoke"):
            turn = sum(clock(run) for run in runs.values())  # finds everything in place
            wanted = int(self.config.getoption("--seconds") / max(turn, 1e-6))
            rounds = min(max(wanted, LEAST), MOST)

        def take_turns() -> None:
            for name, other in others.items():
                times[name].append(clock(other))
            self.ceilings.clock.prepare()
            if whole:
                wait()

        def ours() -> None:
            run()
            if whole:
                wait()

        self.benchmark.pedantic(ours, setup=take_turns, rounds=rounds)  # type: ignore[no-untyped-call]  # has no annotations
        if self.benchmark.stats is None:  # --benchmark-disable: everything has run once
            return {**times, OURS: [clock(run)]}
        self.benchmark.extra_info |= {n: statistics.median(t) for n, t in times.items()}
        return {**times, OURS: list(self.benchmark.stats.stats.data)}

    def _row(
        self, name: str, run: Run | Missing, seconds: Mapping[str, list[float]], work: Work
    ) -> Row:
        if isinstance(run, Missing):
            return Row(self.suite, self.case, name, missing=run.reason)
        share = self.ceilings.share(work, statistics.median(seconds[name]))
        return Row.of(self.suite, self.case, name, seconds[name], work, share)


def _check(runs: Mapping[str, Run], agree: Agree | None) -> None:
    """Run each once, and hold what comes out against ours."""
    expected = runs[OURS]()
    for name, run in runs.items():
        if name != OURS:
            result = run()
            if agree is not None:
                agree(result, expected)


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
