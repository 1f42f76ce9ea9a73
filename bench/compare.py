"""`python -m bench.compare BASE`: is the working tree faster or slower than a git ref?

BASE is unpacked beside, with this tree's `bench` and `yolov7/benchmark`, so that both are measured
with one yardstick.
Two processes, one for each tree, run the suites in step and are timed alternately: what disturbs
the machine disturbs both. The paired ratios of a benchmark give a bootstrap interval of their
median at 99 %, looked at after 10, 20 and 40 rounds:

- worse, better: all of the interval lies beyond 5 %; worse only if two fresh processes confirm it;
- same: all of it lies within 5 %;
- inconclusive: it lies across, or one of the trees does not run the benchmark.

Exit code 1 if something is worse, else 0. Work of a CPU is compared on one thread and by processor
time, so that what else the machine does hardly counts (and waiting does not at all); work of a GPU
by CUDA events.
"""

import argparse
import io
import math
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from bench.results import ROOT

CONFIDENCE = 0.99
MARGIN = 0.05
LOOKS = (10, 20, 40)  # rounds after which the interval is looked at
RESAMPLES = 4000
YARDSTICK = ("bench", "yolov7/benchmark")
SECONDS = 30.0  # of one benchmark at most


@dataclass(frozen=True)
class Answer:
    """What was found about one benchmark.

    Attributes:
        name: Of the benchmark.
        verdict: better, worse, same or inconclusive.
        low, high: Interval of the new time over the base's; 0 where nothing was timed.
        base_ms, head_ms: Medians.
        rounds: Of turns.
        reason: Why it is inconclusive.
    """

    name: str
    verdict: str
    low: float = 0.0
    high: float = 0.0
    base_ms: float = 0.0
    head_ms: float = 0.0
    rounds: int = 0
    reason: str = ""


def decide(name: str, base: Sequence[float], head: Sequence[float]) -> Answer:
    """Judge paired seconds of a benchmark, as the module says."""
    ratios = np.log(np.asarray(head) / np.asarray(base))
    draws = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
    medians = np.median(ratios[draws], axis=1)
    tail = (1 - CONFIDENCE) / 2
    low, high = (float(math.exp(q)) for q in np.quantile(medians, (tail, 1 - tail)))
    limit = 1 + MARGIN
    verdict, reason = "inconclusive", "too noisy"
    if low > limit:
        verdict, reason = "worse", ""
    elif high < 1 / limit:
        verdict, reason = "better", ""
    elif low >= 1 / limit and high <= limit:
        verdict, reason = "same", ""
    base_ms, head_ms = (float(np.median(seconds)) * 1e3 for seconds in (base, head))
    return Answer(name, verdict, low, high, base_ms, head_ms, len(ratios), reason)


class Runner:
    """One tree's suites in a process of their own, timed when asked.

    Args:
        tree: With `bench` and the packages.
        targets: What pytest is to run, relative to the tree.
    """

    def __init__(self, tree: Path, targets: Sequence[str]) -> None:
        self.connection: Connection[Any, Any]
        self.connection, theirs = Pipe()
        handle = theirs.fileno()
        command = [sys.executable, "-m", "pytest", *targets, "-q", "--turns", str(handle)]
        command += ["--continue-on-collection-errors", "-p", "no:cacheprovider"]
        command += ["-o", "python_files=bench_*.py", "-o", "python_functions=bench_*"]
        settings = {"PYTHONPATH": str(tree), "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command,
            cwd=tree,
            env={**os.environ, **settings},
            pass_fds=[handle],
            stdout=subprocess.DEVNULL,
        )
        theirs.close()  # so that the end of the process is the end of the connection

    @cached_property
    def names(self) -> list[str]:
        """The benchmarks that it has, in order."""
        return self._receive() or []

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            return None

    def prepare(self, name: str) -> str:
        """Let a benchmark get ready; why it does not, empty if it does."""
        if name not in self.names:
            return "is not there"
        told = self._receive()
        if told is None:
            return "ended before its turn"
        assert told[0] == name, f"{told[0]} is ready instead of {name}"
        return str(told[1])

    def turn(self) -> float:
        """Seconds of one turn of the benchmark that is ready."""
        self.connection.send(True)
        return float(self.connection.recv())

    def release(self) -> None:
        """Let the benchmark that is ready end."""
        self.connection.send(False)

    def stop(self) -> None:
        """End the process."""
        self.connection.close()
        self.process.terminate()
        self.process.wait()


def alternate(name: str, base: Runner, head: Runner) -> Answer:
    """Time a benchmark that is ready in both trees until the answer is clear."""
    seconds: dict[Runner, list[float]] = {base: [], head: []}
    answer = Answer(name, "inconclusive", reason="too noisy")
    started = time.perf_counter()
    for look in LOOKS:
        while len(seconds[base]) < look:
            order = (base, head) if len(seconds[base]) % 2 else (head, base)
            for runner in order:
                seconds[runner].append(runner.turn())
        answer = decide(name, seconds[base], seconds[head])
        if answer.verdict != "inconclusive" or time.perf_counter() - started > SECONDS:
            break
    for runner in (base, head):
        runner.release()
    return answer


def run_both(base: Path, head: Path, targets: Sequence[str]) -> list[Answer]:
    """The answers for every benchmark of the head's suites, from two fresh processes."""
    runners = [Runner(base, targets), Runner(head, targets)]
    answers = []
    try:
        for name in runners[1].names:
            reasons = [runner.prepare(name) for runner in runners]
            told = [f"{t}: {r}" for t, r in zip(("base", "head"), reasons, strict=True) if r]
            if told:
                for runner, reason in zip(runners, reasons, strict=True):
                    if not reason:
                        runner.release()
                answers.append(Answer(name, "inconclusive", reason="; ".join(told)))
            else:
                answers.append(alternate(name, *runners))
    finally:
        for runner in runners:
            runner.stop()
    return answers


def compare(base: Path, head: Path, targets: Sequence[str] = ("bench",)) -> list[Answer]:
    """Answers for every benchmark; what is worse has been so in two pairs of processes.

    Args:
        base: A tree with the head's yardstick.
        head: A tree.
        targets: Suites, files or benchmarks as pytest takes them.
    """
    answers = run_both(base, head, targets)
    suspects = [answer.name for answer in answers if answer.verdict == "worse"]
    if not suspects:
        return answers
    again = {answer.name: answer for answer in run_both(base, head, suspects)}
    return [_confirmed(answer, again) for answer in answers]


def _confirmed(answer: Answer, again: dict[str, Answer]) -> Answer:
    second = again.get(answer.name)
    if second is None or second.verdict == "worse":
        return answer
    return Answer(**{**vars(second), "verdict": "inconclusive", "reason": "worse, but not again"})


def unpack(ref: str, folder: Path) -> None:
    """Write the tree of a git ref, with this tree's yardstick.

    Raises:
        ValueError: Git knows no such ref.
    """
    command = ["git", "-C", str(ROOT), "archive", "--format=tar", ref]
    archive = subprocess.run(command, capture_output=True, check=False)
    if archive.returncode:
        raise ValueError(archive.stderr.decode().strip())
    with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as tar:
        tar.extractall(folder, filter="tar")
    for name in YARDSTICK:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("results"))


def answer_table(answers: Sequence[Answer]) -> Table:
    """What was found, a line for each benchmark."""
    table = Table(title=f"new time over the base's, {CONFIDENCE:.0%} interval, margin {MARGIN:.0%}")
    for heading in ("benchmark", "base ms", "new ms", "ratio", "rounds", "answer"):
        table.add_column(heading, justify="left" if heading in ("benchmark", "answer") else "right")
    for a in answers:
        numbers = ["", "", "", ""]
        if a.rounds:
            numbers = [f"{a.base_ms:.4g}", f"{a.head_ms:.4g}", f"{a.low:.3f} to {a.high:.3f}"]
            numbers.append(str(a.rounds))
        reason = f" ({a.reason})" if a.reason else ""
        name = escape(a.name.removeprefix("bench/"))
        table.add_row(name, *numbers, a.verdict + reason)
    return table


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print the table; the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__)
    parser.add_argument("base", help="git ref to compare with")
    parser.add_argument("targets", nargs="*", default=["bench"], help="bench/bench_nms.py ...")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        try:
            unpack(options.base, Path(folder))
        except ValueError as error:
            parser.error(str(error))
        answers = compare(Path(folder), ROOT, options.targets)
    Console(width=140).print(answer_table(answers))
    return int(any(answer.verdict == "worse" for answer in answers))


if __name__ == "__main__":
    sys.exit(main())
