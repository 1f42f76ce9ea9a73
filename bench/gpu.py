"""`python -m bench.gpu`: everything that only a GPU can tell, in a few minutes of one.

Each part runs in processes of its own with a share of the time, writes as it goes, and leaves what
it has when it is stopped; a run on the same folder goes on where the last one ended:

- tests: every layer of the family in every type with every config, and the tests of the kernels;
- tune: configs, the most expensive layers first, then the cost model beside them (`bench.fit`);
- bench: every step of the plan, engine, kernels, beside their baselines;
- train: the training step and its kernels.

The folder then holds ``results.json`` (environment, ceilings, rows, steps, checks), ``configs/``,
``log.txt`` and pictures. ``python -m bench.tables --keep FOLDER`` takes it into the repository.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.layers import read
from bench.plots import save_pictures
from bench.results import ROOT, Report, environment, read_rows
from yolov7.atomic import atomic
from yolov7.benchmark.ceilings import Ceilings
from yolov7.kernels.conv.config import user_configs

SHARES = {"tests": 3.0, "tune": 4.0, "bench": 5.0, "train": 1.5}
POLL_SECONDS = 1.0
GRACE_SECONDS = 5.0  # from being asked to end to being ended
# The tuner's clock starts behind its imports, and the config that it is at when its time is over
# has to be compiled and compared.
TUNER_SECONDS = 20.0
# Suites that share a process, the most telling first, and their share of the time that is left;
# what was cut off goes on in the next process that names it.
SUITES = (
    (("engine",), 0.3),
    (("nms", "letterbox", "decode", "pool", "concat", "reparam", "conv"), 0.5),
    (("compiled",), 0.6),
    (("engine", "conv"), 1.0),
)
TRAINING = ("loader", "bn_silu", "train")  # the last of which compiles for minutes
CONFIGS = user_configs()


@dataclass
class Run:
    """A run and its folder.

    Attributes:
        folder: What is found goes here.
        dry: On a CPU with toy sizes, kernels in the interpreter.
        report: Environment and ceilings; rows and steps are read from the files of the parts.
        ended: How each process ended, by name.
    """

    folder: Path
    dry: bool
    report: Report
    ended: dict[str, str] = field(default_factory=dict)

    def process(self, name: str, command: Sequence[str], until: float, **settings: str) -> int:
        """Run a Python module until it ends or its time is over, writing results meanwhile.

        Args:
            name: For the report.
            command: Module and arguments.
            until: `time.monotonic` at which it is stopped.
            settings: Environment variables.

        Returns:
            The exit code; -1 if it was stopped.
        """
        print(f"{name}: {' '.join(command)}", flush=True)
        variables = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", **settings}
        with (self.folder / "log.txt").open("a") as log:
            log.write(f"\n== {name}: {' '.join(command)}\n")
            log.flush()
            process = subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=ROOT,
                env=variables,
                stdout=log,
                stderr=log,
                process_group=0,  # its workers end with it, or they would disturb what is next
            )
            try:
                while (code := process.poll()) is None and time.monotonic() < until:
                    self.write()
                    time.sleep(POLL_SECONDS)
            finally:
                _end(process)
        self.ended[name] = (
            "out of time" if code is None else "done" if code == 0 else f"exit {code}"
        )
        self.write()
        return -1 if code is None else code

    def write(self) -> None:
        """Write results.json whole, and copy the configs that were found so far."""
        self.report.rows = read_rows(self.folder / "rows.jsonl")
        self.report.steps = list(read(self.folder / "steps.jsonl").values())
        checks = read(self.folder / "checks.jsonl")
        wrong = {name: entry["wrong"] for name, entry in checks.items() if entry["wrong"]}
        configs = sum(entry.get("configs", 1) for entry in checks.values())
        self.report.checks = {
            "layers": len(checks),
            "configs": configs,
            "wrong": wrong,
            "processes": self.ended,
        }
        with atomic(self.folder / "results.json") as temporary:
            temporary.write_text(self.report.as_json())
        if CONFIGS.exists():
            shutil.copytree(CONFIGS, self.folder / "configs", dirs_exist_ok=True)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and its children; one that waits for a kernel that hangs hears no signal."""
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def go_on(attempt: Callable[[], int], progress: Callable[[], object]) -> None:
    """Begin again behind a kernel that took its process down, as long as that gets further.

    Args:
        attempt: Runs the process, which goes on behind what it finds done; see `Run.process`.
        progress: What is done, to compare.
    """
    while True:
        before = progress()
        if attempt() in (0, -1) or progress() == before:
            return


def run_tests(run: Run, until: float) -> None:
    """Layers with all their configs, then tests."""
    half = time.monotonic() + (until - time.monotonic()) / 2
    file = run.folder / "checks.jsonl"
    command = ["bench.layers", "check", str(file), *(["--small"] if run.dry else [])]
    interpreter = _interpreter(run.dry)
    go_on(
        lambda: run.process("layer checks", command, half, **interpreter),
        lambda: len(read(file)),
    )
    tests = ["tests/kernels/test_layout.py"]
    if not run.dry:
        # The layers were checked just now, and eight workers would not have the memory for them.
        tests = ["tests/kernels", "--ignore=tests/kernels/test_conv_layers.py", "-n", "8"]
        tests += ["-m", "interpreter or gpu"]
    run.process("kernel tests", ["pytest", "-q", *tests], until, **interpreter)


def run_tuning(run: Run, until: float) -> None:
    """fp16, then fp8; the tuner needs to know when to stop, so that no layer is half done."""
    for precision, share in (("fp16", 0.7), ("fp8", 1.0)):
        end = time.monotonic() + share * (until - time.monotonic()) - TUNER_SECONDS

        def attempt(precision: str = precision, end: float = end) -> int:
            minutes = f"{max(end - time.monotonic(), 0.0) / 60:.2f}"
            command = ["yolov7", "tune", "--precision", precision, "--minutes", minutes]
            return run.process(f"tuning {precision}", command, until)

        go_on(attempt, lambda: [file.read_bytes() for file in sorted(CONFIGS.rglob("*.json"))])
    for file in CONFIGS.glob("*/conv.json"):
        target = run.folder / f"model-{file.parent.name}.json"
        command = ["bench.fit", str(file), "--json", str(target)]
        run.process("cost model", command, time.monotonic() + TUNER_SECONDS)


def run_benchmarks(run: Run, until: float) -> None:
    """Steps of the plan, then the suites."""
    small = ["--small"] if run.dry else []
    steps = ["bench.layers", "time", str(run.folder / "steps.jsonl"), *small]
    quarter = time.monotonic() + (until - time.monotonic()) / 4
    go_on(
        lambda: run.process("steps", steps, quarter),
        lambda: len(read(run.folder / "steps.jsonl")),
    )
    for index, (suites, share) in enumerate(SUITES):
        now = time.monotonic()
        _suites(run, f"suites {index}", suites, now + (until - now) * share)


def run_training(run: Run, until: float) -> None:
    """The training step, the loss, the loader."""
    _suites(run, "training suites", TRAINING, until)


def _suites(run: Run, name: str, suites: Sequence[str], until: float) -> None:
    files = [f"bench/bench_{suite}.py" for suite in suites]
    pace = ["--smoke"] if run.dry else ["--seconds", "0.5"]
    rows = run.folder / "rows.jsonl"
    command = ["pytest", "-q", *files, *pace, "--rows", str(rows)]
    slow = {"engine", "compiled"} & set(suites)  # a network takes minutes in the interpreter

    def attempt() -> int:
        code = run.process(name, command, until, **_interpreter(run.dry and not slow))
        return 0 if code == pytest.ExitCode.TESTS_FAILED else code  # they would fail again

    go_on(attempt, lambda: len(read_rows(rows)))


def _interpreter(wanted: bool) -> dict[str, str]:
    return {"TRITON_INTERPRET": "1"} if wanted else {}


PARTS: dict[str, Callable[[Run, float], None]] = {
    "tests": run_tests,
    "tune": run_tuning,
    "bench": run_benchmarks,
    "train": run_training,
}


def ceilings(device: torch.device, *, small: bool) -> dict[str, float]:
    """What the device reaches, fp8 where it has it."""
    measured = Ceilings(device, small=small)
    assert measured.bandwidth
    dtypes = [torch.float32]
    if device.type == "cuda":
        dtypes += [torch.float16, torch.bfloat16]
        dtypes += [torch.float8_e4m3fn] * (torch.cuda.get_device_capability(device) >= (8, 9))
    for dtype in dtypes:
        measured.flops(dtype)
    return measured.as_dict()


def main(arguments: Sequence[str] | None = None) -> int:
    """Do the parts that were asked for; 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--minutes", type=float, default=8.0, help="for all parts together")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu-run"), help="folder")
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on a CPU")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.dry_run:
        parser.error("no GPU is here; --dry-run needs none")
    end = time.monotonic() + 60 * options.minutes
    options.out.mkdir(parents=True, exist_ok=True)
    report = Report(environment(device), ceilings(device, small=options.dry_run))
    run = Run(options.out.resolve(), options.dry_run, report)
    run.write()
    waiting = [name for name in PARTS if name in options.only]
    while waiting:
        now, part = time.monotonic(), waiting[0]
        share = SHARES[part] / sum(SHARES[name] for name in waiting)
        PARTS[part](run, now + (end - now) * share)
        waiting.pop(0)
    save_pictures(run.report, run.folder)
    print(json.dumps(run.report.checks, indent=1))
    return int(bool(run.report.checks["wrong"]) or _failed(run.ended))


def _failed(ended: dict[str, Any]) -> bool:
    return any(ended.get(name, "").startswith("exit") for name in ("layer checks", "kernel tests"))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that it ends what it has started
    sys.exit(main())
