"""The GPU run without a GPU: cut short, and gone on with."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from bench import gpu
from bench.layers import Job, read, work_off
from bench.results import Report, Row


def test_what_is_finished_is_on_disk(tmp_path: Path) -> None:
    """A whole dry run, in less time than it takes: each part leaves what it has."""
    assert gpu.main(["--dry-run", "--minutes", "0.2", "--out", str(tmp_path)]) == 0
    report = Report.load(tmp_path / "results.json")
    assert {"device", "commit", "date", "versions"} <= set(report.environment)
    assert report.ceilings["copy GB/s"] > 0
    ended = report.checks["processes"]
    parts = {"layer checks", "kernel tests", "tuning fp16", "tuning fp8", "steps"}
    assert parts | {f"suites {i}" for i in range(len(gpu.SUITES))} <= set(ended)
    assert set(ended.values()) <= {"done", "out of time", "exit 1"}  # of the tuner, without a GPU
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

    def process(run: gpu.Run, name: str, command: list[str], until: float, **settings: str) -> int:
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


def test_results_are_taken_into_the_repository(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from bench import readme

    run, repository = tmp_path / "run", tmp_path / "repository"
    known = {"device": "NVIDIA H200", "date": "2026-01-02T00:00:00", "commit": "unknown"}
    configs = run / "configs" / "NVIDIA_H200" / "conv.json"
    configs.parent.mkdir(parents=True)
    configs.write_text("{}")
    report = Report(known, {}, [Row("nms", "batch 1", "ours", 5, 1.0)])
    (run / "results.json").write_text(report.as_json())
    monkeypatch.setattr(readme, "ROOT", repository)
    monkeypatch.setattr(Report, "save", lambda report: _saved(report, repository))
    path = readme.keep(run)
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
