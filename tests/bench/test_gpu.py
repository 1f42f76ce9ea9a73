"""The GPU run without a GPU: cut short, and gone on with."""

import json
import os
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import conftest, gpu, layers
from bench.comparison import ROWS
from bench.layers import Job, read, work_off
from bench.results import ROOT, Report, Row, read_rows
from yolov7.kernels.conv import ConvConfig, ConvLaunch, Launch
from yolov7.kernels.conv.cases import Record, layer_of, meta_call

Command = list[str]


def synchronize(device: object = None) -> None:
    """As on a device that a kernel took down."""
    raise torch.AcceleratorError("CUDA error: an illegal memory access\nmore")


def test_what_is_finished_is_on_disk(tmp_path: Path) -> None:
    """A whole dry run, in less time than it takes: each part leaves what it has."""
    assert gpu.main(["--dry-run", "--minutes", "0.2", "--out", str(tmp_path)]) == 0
    report = Report.load(tmp_path / "results.json")
    assert {"device", "commit", "date", "versions"} <= set(report.environment)
    assert report.ceilings["copy GB/s"] > 0
    ended = report.checks["processes"]
    parts = {"layer checks", "kernel tests", "tuning fp16", "tuning fp8", "steps"}
    assert parts | {f"suites {i}" for i in range(len(gpu.SUITES))} <= set(ended)
    for name, how in ended.items():
        allowed = {"exit 1"} if name.startswith("tuning") else set()  # without a GPU
        assert how in {"done", "out of time"} | allowed, name
    assert "tuning fp16" in (tmp_path / "log.txt").read_text()


def test_no_gpu_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        gpu.main([])
    assert "--dry-run needs none" in capsys.readouterr().err


@pytest.mark.parametrize("failure", ["layer checks", "kernel tests"])
def test_failures_are_the_exit_code(
    failure: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong layer, restarted behind it, or a test that failed."""
    file = tmp_path / "checks.jsonl"

    def process(run: gpu.Run, name: str, command: Command, until: float, **settings: str) -> int:
        if name == "layer checks":
            lines = len(read(file))
            wrong = {"error": "AcceleratorError"} if failure == name and not lines else {}
            with file.open("a") as lines_file:
                lines_file.write(json.dumps({"name": f"layer {lines}", "wrong": wrong}) + "\n")
            run.write()
            return int(bool(wrong))
        run.ended[name] = "exit 1" if name == failure else "done"
        run.write()
        return 0

    monkeypatch.setattr(gpu.Run, "process", process)
    assert gpu.main(["--dry-run", "--only", "tests", "--out", str(tmp_path)]) == 1
    checks = Report.load(tmp_path / "results.json").checks
    assert checks["layers"] == (2 if failure == "layer checks" else 1)
    assert bool(checks["wrong"]) == (failure == "layer checks")


def test_layer_that_leaves_no_entry_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The compiler may take the process down."""

    def process(run: gpu.Run, name: str, command: Command, until: float, **settings: str) -> int:
        run.ended[name] = "exit -6" if name == "layer checks" else "done"
        run.write()
        return -6 if name == "layer checks" else 0

    monkeypatch.setattr(gpu.Run, "process", process)
    assert gpu.main(["--dry-run", "--only", "tests", "--out", str(tmp_path)]) == 1


@pytest.fixture
def run(tmp_path: Path) -> gpu.Run:
    return gpu.Run(tmp_path, False, Report({}, {}))


PARENT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
open(sys.argv[1], "w").write(f"{child.pid} {os.getsid(0)}")
time.sleep(60)
"""


def test_what_a_process_started_ends_with_it(run: gpu.Run, tmp_path: Path) -> None:
    """Workers of the kernel tests would disturb the times that are taken next."""
    (tmp_path / "parent.py").write_text(PARENT)
    file = tmp_path / "pids"
    until = time.monotonic() + 1.5
    assert run.process("a", ["parent", str(file)], until, PYTHONPATH=str(tmp_path)) == -1
    assert run.ended == {"a": "out of time"}
    child, session = map(int, file.read_text().split())
    assert session == os.getsid(0)  # whoever ends the session of the run ends its parts too
    await_that(lambda: ended(child), 5)


def await_that(holds: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def ended(process: int) -> bool:
    """Whether it is gone, but for an exit code that nobody has asked for."""
    try:
        return ") Z " in Path(f"/proc/{process}/stat").read_text()
    except FileNotFoundError:
        return True


def test_run_that_is_stopped_stops_its_parts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--dry-run", "--only", "train", "--out"]
    process = subprocess.Popen([*command, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    log = tmp_path / "log.txt"
    await_that(lambda: log.exists() and bool(children.read_text()), 60)
    parts = list(map(int, children.read_text().split()))
    process.terminate()
    assert process.wait(10) == 1
    await_that(lambda: all(map(ended, parts)), 30)


def test_layers_are_checked_once(run: gpu.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    commands = recorded(monkeypatch)
    gpu.run_tests(run, time.monotonic() + 60)
    checks, tests = commands
    assert checks[:2] == ["bench.layers", "check"]
    assert "--ignore=tests/kernels/test_conv_layers.py" in tests
    assert Path("tests/kernels/test_conv_layers.py").exists()


def recorded(monkeypatch: pytest.MonkeyPatch, *codes: int) -> list[Command]:
    """Commands that would have been run; they end with these codes, then with 0."""
    commands: list[Command] = []
    left = list(codes)

    def process(run: gpu.Run, name: str, command: Command, until: float, **settings: str) -> int:
        commands.append(command)
        return left.pop(0) if left else 0

    monkeypatch.setattr(gpu.Run, "process", process)
    return commands


def test_tuner_is_told_to_end_before_it_is_stopped(
    run: gpu.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its minutes count from behind its imports, and its last config takes a while."""
    commands = recorded(monkeypatch)
    gpu.run_tuning(run, time.monotonic() + 120)
    seconds = [60 * float(command[-1]) for command in commands]
    assert [command[:2] for command in commands] == [["yolov7", "tune"]] * 2
    assert [command[3] for command in commands] == ["fp16", "fp8"]
    assert seconds == pytest.approx([0.7 * 120 - 20, 120 - 20], abs=1)
    gpu.run_tuning(run, time.monotonic() + 5)
    assert commands[-1][-1] == "0.00"


def test_tuner_goes_on_behind_what_took_it_down(
    run: gpu.Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As long as each time it got further."""
    monkeypatch.setattr(gpu, "CONFIGS", tmp_path / "configs")
    file = tmp_path / "configs" / "GPU" / "conv.json"
    file.parent.mkdir(parents=True)
    file.write_text("")
    names: list[str] = []

    def process(run: gpu.Run, name: str, command: Command, until: float, **settings: str) -> int:
        names.append(name)
        if len(names) <= 2:
            file.write_text(file.read_text() + "entry")
        return 1

    monkeypatch.setattr(gpu.Run, "process", process)
    gpu.run_tuning(run, time.monotonic() + 60)
    assert names == ["tuning fp16"] * 3 + ["tuning fp8", "cost model"]


def test_suites_go_on_behind_what_took_the_device_down(
    run: gpu.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The benchmark is noted, so the next process begins behind it."""
    rows = run.folder / "rows.jsonl"
    names: list[str] = []

    def process(run: gpu.Run, name: str, command: Command, until: float, **settings: str) -> int:
        names.append(name)
        with rows.open("a") as file:
            file.write(Row("nms", f"batch {len(names)}", "ours").as_line())
        return [2, 1][len(names) - 1]  # the device is down; an ordinary failure would come again

    monkeypatch.setattr(gpu.Run, "process", process)
    gpu.run_training(run, time.monotonic() + 60)
    assert names == ["training suites"] * 2


def test_loader_is_timed_before_anything_is_compiled() -> None:
    assert gpu.TRAINING[0] == "loader"


def test_results_are_taken_into_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import tables

    run, repository = tmp_path / "run", tmp_path / "repository"
    known = {"device": "NVIDIA H200", "date": "2026-01-02T00:00:00", "commit": "unknown"}
    configs = run / "configs" / "NVIDIA_H200" / "conv.json"
    configs.parent.mkdir(parents=True)
    configs.write_text("{}")
    report = Report(known, {}, [Row("nms", "batch 1", "ours", 5, 1.0)])
    (run / "results.json").write_text(report.as_json())
    with tarfile.open(tmp_path / "run.tgz", "w:gz") as archive:  # as it comes from elsewhere
        archive.add(run, "gpu-run")
    with tarfile.open(tmp_path / "run.tgz") as archive:
        archive.extractall(tmp_path, filter="data")
    run = tmp_path / "gpu-run"
    monkeypatch.setattr(tables, "ROOT", repository)
    monkeypatch.setattr(Report, "save", lambda report: _saved(report, repository))
    path = tables.keep(run)
    kept = Report.load(path)
    assert kept.rows == report.rows
    assert kept.environment["commit"] not in ("", "unknown")  # a checkout without its history
    assert (repository / "kernels" / "configs" / "NVIDIA_H200" / "conv.json").read_text() == "{}"


def _saved(report: Report, folder: Path) -> Path:
    path = folder / "results" / "report.json"
    path.parent.mkdir(parents=True)
    path.write_text(report.as_json())
    return path


def test_layers_go_on_behind_a_failure(tmp_path: Path) -> None:
    file = tmp_path / "checks.jsonl"
    done: list[str] = []

    def jobs() -> Iterator[Job]:
        def fine(name: str) -> dict[str, object]:
            done.append(name)
            return {"configs": 2, "wrong": {}}

        def broken() -> dict[str, object]:
            raise RuntimeError("illegal memory access\nmore")

        yield "a", lambda: fine("a")
        yield "b", broken
        yield "c", lambda: fine("c")

    assert work_off(jobs(), file) == 1
    assert work_off(jobs(), file) == 0
    assert done == ["a", "c"]
    found = read(file)
    assert found["b"]["wrong"] == {"error": "RuntimeError: illegal memory access"}
    file.write_text(file.read_text() + '{"name": "d", "wr')
    assert list(read(file)) == ["a", "b", "c"]


def small_launch() -> Launch:
    return ConvLaunch([meta_call(layer_of(Record(16, 24, 1, 1, 4, 5), 1), torch.float32)])


def test_config_that_takes_the_device_down_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing that comes after it in a dead device is held to be wrong."""
    file = tmp_path / "checks.jsonl"
    names = {"chosen": 16, "default": 32, "of 1x2": 64}
    configs = {
        name: ConvConfig(block_m=rows, block_n=16, block_k=16) for name, rows in names.items()
    }
    monkeypatch.setattr(layers, "shipped_configs", lambda _: configs)

    def check_config(launch: Launch, expected: object, config: ConvConfig) -> str | None:
        if config.block_m == 32:
            synchronize()
        return None

    monkeypatch.setattr(layers, "check_config", check_config)

    def jobs() -> Iterator[Job]:
        yield "a", lambda: layers.check(small_launch(), torch.device("cpu"))
        yield "b", lambda: {"configs": 2, "wrong": {}}

    assert work_off(jobs(), file) == 1
    (entry,) = read(file).values()
    error = "AcceleratorError: CUDA error: an illegal memory access"
    assert entry == {"wrong": {"error": f"default {configs['default']}: {error}"}}
    assert work_off(jobs(), file) == 0
    assert read(file)["b"]["wrong"] == {}


def test_benchmark_that_takes_the_device_down_ends_its_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its case is noted: it would do it again."""
    path = tmp_path / "rows.jsonl"
    config = SimpleNamespace(stash={ROWS: []}, getoption={"--rows": path}.get)
    item: Any = SimpleNamespace(name="bench_nms[batch 1, conf 0.25]", config=config)
    conftest.pytest_exception_interact(item)
    assert read_rows(path) == []

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(pytest.exit.Exception, match="illegal memory access"):
        conftest.pytest_exception_interact(item)
    reason = "AcceleratorError: CUDA error: an illegal memory access"
    assert read_rows(path) == [Row("nms", "batch 1, conf 0.25", "ours", missing=reason)]
