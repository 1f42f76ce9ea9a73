"""Rows, reports, the table, and the documents' tables."""

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from bench import tables
from bench.plots import save_pictures
from bench.results import Report, Row, comparison_table, environment, read_rows

ENVIRONMENT: dict[str, Any] = {
    "device": "Some CPU",
    "cores": 2,
    "versions": {"torch": "2.13.0"},
    "commit": "abc",
    "changed": False,
    "date": "2026-01-02T03:04:05+00:00",
}
ROWS = [
    Row("nms", "batch 1", "ours", turns=5, p50_ms=2.0, p99_ms=3.0),
    Row("nms", "batch 1", "eager", turns=5, p50_ms=6.0),
    Row("nms", "batch 1", "torchvision", missing="is not installed"),
    Row("loader", "mosaic", "ours", turns=5, p50_ms=10.0),
    Row("loader", "mosaic", "plain", turns=5, p50_ms=5.0),
    Row("start", "", "ours", turns=5, p50_ms=100.0),
]
GPU = {**ENVIRONMENT, "device": "NVIDIA H200", "cuda": "13.0"}


def test_rows_survive_a_cut(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert read_rows(path) == []
    path.write_text("".join(row.as_line() for row in ROWS) + '{"suite": "n')
    assert read_rows(path) == ROWS


def test_report_is_kept_by_device_date_and_commit(tmp_path: Path) -> None:
    report = Report(ENVIRONMENT, {"copy GB/s": 10.0}, ROWS)
    path = report.save(tmp_path)
    assert path == tmp_path / "Some_CPU" / "2026-01-02-abc.json"
    assert Report.load(path) == report
    assert report.find("nms", "batch 1") == ROWS[0]
    assert report.find("nms", "batch 1", "torchvision") is None


def test_environment_says_what_is_needed_to_measure_again() -> None:
    known = environment(torch.device("cpu"))
    assert set(ENVIRONMENT) <= set(known)
    assert known["versions"]["torch"] == torch.__version__


def test_environment_of_a_system_without_affinity(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    assert environment(torch.device("cpu"))["cores"] == os.cpu_count()


def test_table_shows_losses() -> None:
    console = Console(width=140, record=True)
    console.print(comparison_table(ROWS))
    text = console.export_text()
    assert "3.00" in text
    assert "win" in text
    assert "0.50" in text
    assert "loss" in text


def test_section_without_a_gpu_says_so() -> None:
    text = "\n".join(tables.speed([Report(ENVIRONMENT, {}, ROWS)]))
    assert "nothing has been measured yet" in text
    assert "| nms batch 1 | 2 | eager | 6 | 3.00 | win |" in text
    assert "| loader mosaic | 10 | plain | 5 | 0.50 | loss |" in text
    assert "| start | 100 |" in text


def test_section_of_a_gpu() -> None:
    def network(suite: str, case: str, ours: float) -> list[Row]:
        mine = Row(suite, case, "ours", 9, ours, 2 * ours, ceiling_percent=50, images_per_s=7000)
        return [mine, Row(suite, case, "eager", 9, 3 * ours, images_per_s=2000)]

    rows = network("engine", "yolov7, batch 1", 0.5) + network("engine", "yolov7, batch 32", 4.5)
    layers = [
        Row("conv", f"batch {batch}, layer {i}", body, 9, ms)
        for batch in (1, 32)
        for i in range(20)
        for body, ms in (("ours", 1.0), ("eager", 2.0 if i else 0.5))
    ]
    checks = {"layers": 7, "configs": 9, "wrong": {}, "processes": {}}
    text = "\n".join(tables.speed([Report(GPU, {}, rows + layers, [], checks)]))
    assert "nothing has been measured" not in text
    assert "| yolov7 | 0.500 | 1.000 | 7000 | 50 % | 2000 images/s |" in text
    assert "conv batch 32, mean of 20 | 1 | eager | 1.866 | 1.87 | 19 win, 0 even, 1 loss" in text
    assert "9 configs of 7 layers" in text


@pytest.mark.parametrize("name", ["accuracy", "speed", "peers"])
def test_documents_show_the_kept_results(name: str) -> None:
    text = tables.document(name).read_text()
    anew = tables.rewritten(text, name, tables.tables()[name])
    assert text == anew, "run `python -m bench.tables`"


def test_a_document_without_markers() -> None:
    with pytest.raises(ValueError, match="has no lines"):
        tables.rewritten("# a document", "speed", [])


def test_pictures(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    step = {"batch": 1, "kind": "conv", "shape": "3x3", "us": 4.0, "roofline_us": 2.0}
    pictures = save_pictures(Report(GPU, {}, ROWS, [step, {"batch": 1}]), tmp_path)
    assert [path.name for path in pictures] == ["steps-1.png", "ratios.png"]
    assert all(path.stat().st_size > 1000 for path in pictures)
