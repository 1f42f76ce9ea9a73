import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from yolov7.benchmark import memory, stages
from yolov7.benchmark.stages import measure
from yolov7.checkpoint import load_model
from yolov7.cli import main
from yolov7.engine.choose import Runtime
from yolov7.layers import conv_layers


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_every_stage_is_timed(engine: str) -> None:
    model = load_model()
    timing = measure(
        Runtime(weights=model, engine=engine, device="cpu", imgsz=64), batch=2, rounds=3
    )
    named = {"letterbox", "upload", "network", "nms", "whole"}
    assert set(timing.samples) == named | ({"decode", "download"} if engine == "graph" else set())
    assert all(len(times) == 3 and min(times) >= 0 for times in timing.samples.values())
    assert timing.samples["network"][0] > 0
    assert timing.flops == sum(layer.flops for layer in conv_layers(model, 64, 64))
    totals = timing.totals()
    assert totals["launches"] == (44 if engine == "graph" else None)
    assert totals["images_per_second"] > 0
    assert totals["percent_of_ceiling"] > 0
    assert {row["stage"] for row in timing.rows()} == set(timing.samples)
    assert all(0 < step["roofline_us"] < 100 * step["us"] for step in timing.steps)


def test_bench_writes_rows_totals_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "new" / "bench.json"
    arguments = ["bench", "--engines", "eager", "graph", "--imgsz", "64", "--rounds", "2"]
    where = ["--device", "cpu", "--project", str(tmp_path), "--json", str(result)]
    assert main([*arguments, *where]) == 0
    written = json.loads(result.read_text())
    assert [t["engine"] for t in written["totals"]["engines"]] == ["eager", "graph"]
    assert {row["engine"] for row in written["rows"]} == {"eager", "graph"}
    assert (tmp_path / "1" / "bench.png").stat().st_size > 10_000
    assert "images/s" in capsys.readouterr().out


def test_an_exported_file_is_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    file, result = tmp_path / "demo.onnx", tmp_path / "bench.json"
    assert main(["export", "--format", "onnx", "--imgsz", "64", "--output", str(file)]) == 0
    where = ["--project", str(tmp_path), "--json", str(result), "--rounds", "2"]
    assert main(["bench", "--weights", str(file), *where]) == 0
    (total,) = json.loads(result.read_text())["totals"]["engines"]
    assert total["engine"].startswith("onnxruntime")
    assert total["images_per_second"] > 0
    assert total["percent_of_ceiling"] is None


def test_a_file_of_others_is_timed_with_names_and_layout(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    file, result = tmp_path / "other.onnx", tmp_path / "bench.json"
    assert main(["export", "--imgsz", "64", "--output", str(file)]) == 0
    graph = onnx.load(file)
    del graph.metadata_props[:]
    onnx.save(graph, file)
    arguments = ["bench", "--weights", str(file), "--rounds", "2", "--json", str(result)]
    described = ["--names", "a", "b", "c", "--layout", "grid", "--project", str(tmp_path)]
    for words in ([], ["--soak", "0.1"]):
        assert main([*arguments, *described, *words]) == 0
        assert json.loads(result.read_text())["rows"]
    for words in (["--weights", str(file), "--variant", "yolov7"], []):
        assert main(["bench", *described, *words]) == 1
        assert "leave " in capsys.readouterr().err


def test_the_peak_is_that_of_one_engine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    events: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: 2)
        patch.setattr(stages, "Detector", lambda *_, **__: events.append("built"))
        patch.setattr(torch.cuda, "init", lambda: events.append("init"))
        patch.setattr(torch.cuda, "reset_peak_memory_stats", events.append)
        with pytest.raises(TypeError):  # None detects nothing
            measure(Runtime(device="cuda:1"))
    assert events == ["init", 0, 1, "built"]
    arguments = ["bench", "--engines", "eager", "--imgsz", "64", "--rounds", "1", "--device", "cpu"]
    assert main([*arguments, "--project", str(tmp_path)]) == 0
    assert "MiB of the process at most" in " ".join(capsys.readouterr().out.split())


WITHOUT = """
import sys
sys.modules["resource"] = None
from yolov7.benchmark import memory
memory.HELD = memory.HELD / "nowhere"
from yolov7.cli import main
words = ["bench", "--imgsz", "64", "--device", "cpu", "--project", sys.argv[1]]
assert main([*words, "--engines", "eager", "--rounds", "1"]) == 0
assert main([*words, "--engine", "eager", "--soak", "0.1", "--json", sys.argv[2]]) == 0
"""


def test_systems_that_tell_no_memory_are_timed(tmp_path: Path) -> None:
    """Windows has no module resource, and only Linux has /proc."""
    command = [sys.executable, "-c", WITHOUT, str(tmp_path), str(tmp_path / "soak.json")]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    printed = " ".join(run.stdout.split())
    assert "peak of memory unknown, first boxes" in printed
    assert "growth of memory unknown" in printed
    assert json.loads((tmp_path / "soak.json").read_text())["rows"][0]["growth_bytes"] is None


def test_memory_of_the_process() -> None:
    cpu = torch.device("cpu")
    held, peak = memory.held_bytes(cpu), memory.peak_bytes(cpu)
    assert held is not None
    assert peak is not None
    assert 1 << 20 < held <= peak


def test_no_peak_is_below_what_is_held(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Linux's two counters differ by the pages that one of them counts late."""
    pages = tmp_path / "statm"
    pages.write_text(f"0 {1 << 30} 0")
    monkeypatch.setattr(memory, "HELD", pages)
    cpu = torch.device("cpu")
    assert memory.peak_bytes(cpu) == memory.held_bytes(cpu)


def test_soak_reports_tail_drift_and_growth(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = tmp_path / "soak.json"
    arguments = ["bench", "--soak", "0.2", "--imgsz", "64", "--device", "cpu", "--engine", "eager"]
    assert main([*arguments, "--json", str(result)]) == 0
    (row,) = json.loads(result.read_text())["rows"]
    assert row["frames"] >= 10
    assert row["p50"] <= row["p99"] <= row["p99.9"]
    assert {"drift", "growth_bytes"} <= row.keys()
    assert "memory grew by" in capsys.readouterr().out


def test_bad_options_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--rounds", "0"]) == 1
    assert "rounds is 0: give a whole number" in capsys.readouterr().err
    assert main(["bench", "--engines", "fast"]) == 1
    assert "engine fast: give auto, eager, compile or graph" in capsys.readouterr().err
