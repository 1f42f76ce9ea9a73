"""How closely others' results must be ours, and who times whom."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.comparison import LEAST, close, equal
from bench.results import ROOT


def test_wrong_results_do_not_pass() -> None:
    a = torch.randn(3, 4)
    close(1e-6)([a], [a])
    equal((a, 1), (a, 1))
    for wrong in (a + 0.1, a.where(a != a[0, 0], float("nan"))):
        with pytest.raises(AssertionError, match="relative RMS"):
            close(1e-3)(wrong, a)
        with pytest.raises(AssertionError):
            equal(wrong, a)
    with pytest.raises(AssertionError, match="is not"):
        close(1.0)(a, a[:1])


def test_ours_is_timed_by_pytest_benchmark_by_turns_with_the_others(tmp_path: Path) -> None:
    file, rows = tmp_path / "x.json", tmp_path / "rows.jsonl"
    words = ["--smoke", "--benchmark-quiet", "--benchmark-json", str(file), "--rows", str(rows)]
    command = [sys.executable, "-m", "pytest", "bench/bench_pipeline.py", *words]
    # pytest-benchmark measures nothing where it finds itself in a worker of pytest-xdist.
    alone = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_XDIST")}
    subprocess.run(command, check=True, cwd=ROOT, env=alone, stdout=subprocess.DEVNULL)
    benchmarks = {entry["name"]: entry for entry in json.loads(file.read_text())["benchmarks"]}
    pipeline = benchmarks["bench_pipeline[yolov7]"]
    ours, network = (json.loads(line) for line in rows.read_text().splitlines()[:2])
    assert pipeline["stats"]["rounds"] == 1 < LEAST
    assert 1e3 * pipeline["stats"]["median"] == pytest.approx(ours["p50_ms"], rel=1e-3)
    assert 1e3 * pipeline["extra_info"]["network"] == pytest.approx(network["p50_ms"], rel=1e-3)
