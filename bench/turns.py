"""Letting another process say when a benchmark takes its turn: the side that is timed.

`bench.compare` starts one pytest for each of two trees. Both collect the same suites; at every
benchmark each waits here, ready, until it is told to take a turn, so the two are timed alternately.
"""

import resource
import statistics
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

from yolov7.benchmark.clock import Run

TURN_SECONDS = 0.05  # short calls are repeated for so long
MOST_CALLS = 50


class Turns:
    """A pytest plugin that tells what is collected, ready or absent, and takes turns when asked.

    Args:
        handle: File descriptor of a connection to the process with the clock.
    """

    def __init__(self, handle: int) -> None:
        self.connection: Connection[object, object] = Connection(handle)
        self.told: set[str] = set()

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Tell what there is."""
        self.connection.send([item.nodeid for item in items])

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """A benchmark that ends without having been ready is absent."""
        if report.nodeid not in self.told and (report.when == "call" or not report.passed):
            self.told.add(report.nodeid)
            self.connection.send((report.nodeid, _reason(report)))

    def take(self, name: str, run: Run, clock: Callable[[Run], float] | None) -> None:
        """Be ready, and take turns as long as they are wanted, timed by a clock or as `busy`."""
        clock = clock or busy
        clock(run)
        calls = max(1, min(MOST_CALLS, int(TURN_SECONDS / clock(run))))
        self.told.add(name)
        self.connection.send((name, ""))
        while self.connection.recv():
            self.connection.send(statistics.median(clock(run) for _ in range(calls)))


def busy(run: Run) -> float:
    """Seconds of the processors that a call keeps busy, child processes included.

    What else runs on the machine does not count, nor does waiting.
    """
    start = _processor_seconds()
    run()
    return _processor_seconds() - start


def _processor_seconds() -> float:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def _reason(report: pytest.TestReport) -> str:
    """Why a benchmark did not run, in one line."""
    if isinstance(report.longrepr, tuple):  # of a skip: file, line, reason
        return report.longrepr[2].removeprefix("Skipped: ")
    lines = report.longreprtext.strip().splitlines()
    errors = [line[1:].strip() for line in lines if line.startswith("E ")]
    return (errors or lines or ["it took no turn"])[0]
