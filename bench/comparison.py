"""What a suite says: which contenders, how they must agree, what work they do.

A benchmark is a pytest function `bench_*` with the axis `body`, whose values are the contenders.
The first of them that runs times them all by turns; each then reports its own times to
pytest-benchmark.
"""

import statistics
from collections.abc import Callable, Mapping
from itertools import chain

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from bench.ceilings import Ceilings
from bench.race import OURS, SMOKE, Agree, Missing, Pace, Run, Work, race
from bench.results import Row

Contenders = Callable[[], Mapping[str, Run | Missing]]
Times = Mapping[str, list[float] | Missing]

ROWS = pytest.StashKey[list[Row]]()
TIMES = pytest.StashKey[dict[str, Times]]()
CEILINGS = pytest.StashKey[Ceilings]()


def bodies(*baselines: str) -> pytest.MarkDecorator:
    """The axis of a benchmark, topmost of its decorators: ours, and what it is held against."""
    return pytest.mark.parametrize("body", [OURS, *baselines])


def identify(item: pytest.Item) -> tuple[str, str, str]:
    """Suite, case and body of a benchmark."""
    suite, _, case = item.name.partition("[")
    callspec = getattr(item, "callspec", None)
    body = str(callspec.params["body"]) if callspec else ""
    case = case.removesuffix("]").removesuffix(body).removesuffix("-")
    return suite.removeprefix("bench_"), case, body


def report(config: pytest.Config, row: Row) -> None:
    """Note a row for the table, and in the file that `--rows` names."""
    config.stash[ROWS].append(row)
    if path := config.getoption("--rows"):
        with path.open("a") as file:
            file.write(row.as_line())


class Comparison:
    """The fixture `compete`: check contenders against each other, time them, report one.

    Args:
        request: Of the benchmark.
        benchmark: Of pytest-benchmark, which is given the times.
    """

    def __init__(self, request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> None:
        self.config = request.config
        self.benchmark = benchmark
        self.name = request.node.nodeid
        self.suite, self.case, self.body = identify(request.node)
        self.ceilings = request.config.stash[CEILINGS]

    def __call__(
        self,
        contenders: Contenders,
        *,
        agree: Agree | None,
        work: Work | None = None,
        whole: bool = False,
    ) -> None:
        """Report the body that is this benchmark's.

        Args:
            contenders: Make the functions to time, by body, ours among them; called once for all.
            agree: Compares the result of each with ours; None where there is nothing to compare.
            work: What has to be done at the least.
            whole: On CUDA too, time from call to result by the host's clock.
        """
        clock = self.ceilings.clock
        turns = self.config.pluginmanager.get_plugin("turns")
        if turns is not None:
            ours = contenders()[OURS]
            assert not isinstance(ours, Missing), ours.reason
            turns.take(self.name, ours, clock.whole if whole and clock.cuda else clock.busy)
            return
        times = self.config.stash[TIMES]
        group = f"{self.suite} {self.case}"
        if group not in times:
            times[group] = self._measure(contenders(), agree, clock.whole if whole else clock)
        seconds = times[group][self.body]
        if isinstance(seconds, Missing):
            self._report(Row(self.suite, self.case, self.body, missing=seconds.reason))
            pytest.skip(seconds.reason)
        self._replay(seconds, group)
        work = work or Work()
        share = self.ceilings.share(work, statistics.median(seconds))
        self._report(Row.of(self.suite, self.case, self.body, seconds, work, share))

    def _measure(
        self,
        runs: Mapping[str, Run | Missing],
        agree: Agree | None,
        clock: Callable[[Run], float],
    ) -> Times:
        present = {name: run for name, run in runs.items() if not isinstance(run, Missing)}
        absent = {name: run for name, run in runs.items() if isinstance(run, Missing)}
        expected = present[OURS]()
        for name, run in present.items():
            if name != OURS:
                result = run()
                if agree is not None:
                    agree(result, expected)
        option = self.config.getoption
        pace = SMOKE if option("--smoke") else Pace(option("--seconds"))
        return {**race(present, clock, pace), **absent}

    def _replay(self, seconds: list[float], group: str) -> None:
        """Give pytest-benchmark the times, by a clock that shows them one after the other."""
        marks = chain.from_iterable((0.0, duration) for duration in seconds)
        self.benchmark._timer = marks.__next__
        self.benchmark.group = group
        self.benchmark.pedantic(int, rounds=len(seconds))  # type: ignore[no-untyped-call]  # untyped

    def _report(self, row: Row) -> None:
        self.benchmark.extra_info.update(row.as_dict())
        report(self.config, row)
