import io
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from yolov7.train import meter as module
from yolov7.train.meter import Meter, merged
from yolov7.train.report import CsvWriter, Result, TensorBoard, epoch_line, read_rows

ROW = {
    "epoch": 3.0, "lr": 0.01, "box": 0.05, "objectness": 0.02, "classes": 0.01, "matches": 40.0,
    "overflow": 0.0, "images_per_s": 100.0, "waiting": 0.25, "memory_gb": 1.5, "skipped": 0.0,
    "AP": math.nan, "AP50": math.nan,
}  # fmt: skip


def test_rows_survive_the_file_and_a_resumption(tmp_path: Path) -> None:
    path = tmp_path / "results.csv"
    writer = CsvWriter(path, 0)
    for epoch in (1, 2, 3):
        writer.on_epoch({**ROW, "epoch": epoch, "AP": 0.123456789}, None)
    CsvWriter(path, 2).on_epoch({**ROW, "epoch": 3, "lr": 0.5}, None)
    rows = read_rows(path)
    assert [row["epoch"] for row in rows] == [1, 2, 3]
    assert [row["lr"] for row in rows] == [0.01, 0.01, 0.5]
    assert rows[0]["AP"] == 0.123457
    assert math.isnan(rows[2]["AP"])
    assert read_rows(tmp_path / "none.csv") == []
    CsvWriter(path, 0)
    assert not path.exists()


@pytest.mark.parametrize(
    "damage",
    [b"2,x\n", b"2,0.5,7\n", b"2\n", b"\0\xff,\xff\n", b"\n", b'"2,0.5\n', b"," * 100_000 + b"\n"],
    ids=["text", "more", "fewer", "bytes", "empty", "quote", "wide"],
)
def test_damaged_rows_are_left_out(tmp_path: Path, damage: bytes) -> None:
    path = tmp_path / "results.csv"
    path.write_bytes(b"epoch,lr\n1,0.5\n" + damage + b"3,0.25\n")
    assert read_rows(path) == [{"epoch": 1, "lr": 0.5}, {"epoch": 3, "lr": 0.25}]
    path.write_bytes(b"")
    assert read_rows(path) == []


def test_the_meter_averages_over_batches() -> None:
    meter = Meter("epoch", 2, show=False)
    for value in meter.follow([1.0, 3.0]):
        meter.add({"box": torch.tensor(value, dtype=torch.bfloat16)}, images=4)
    row = meter.row()
    assert row["box"] == 2.0
    assert row["images_per_s"] == pytest.approx(8 / meter.seconds)
    assert 0 < row["waiting"] < 1
    assert row["memory_gb"] > 0.01


def test_the_bar_shows_losses_speed_and_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(module, "Console", lambda **_: console)
    monkeypatch.setattr(module, "REFRESH_S", 0.0)
    meter = Meter("epoch 1/9, lr 0.01000", 3)
    for _ in meter.follow(range(3)):
        meter.add({"box": torch.tensor(0.5), "matches": torch.tensor(7)}, images=4)
        time.sleep(0.12)  # rich draws ten times a second
    shown = screen.getvalue()
    for text in ("epoch 1/9, lr 0.01000", "box 0.5000", "images/s", "waiting for data", " GB"):
        assert text in shown
    assert "matches" not in shown


def test_a_slow_loader_shows_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(clock)))
    meter = Meter("epoch", 3, show=False)
    assert list(meter.follow([1, 2, 3])) == [1, 2, 3]
    assert meter.waited == 4  # a tick for each batch and for the end
    assert meter.seconds > meter.waited


def test_rows_of_ranks_are_merged() -> None:
    row = merged([ROW, {**ROW, "box": 0.15, "matches": 20.0, "images_per_s": 80.0}])
    assert row["box"] == pytest.approx(0.1)
    assert row["lr"] == 0.01
    assert (row["matches"], row["images_per_s"]) == (60, 180)


def test_the_line_of_an_epoch() -> None:
    line = epoch_line(ROW, 300)
    assert line == (
        "epoch 3/300: box 0.0500, objectness 0.0200, classes 0.0100, lr 0.01000; "
        "100 images/s, 25% waiting for data"
    )
    line = epoch_line({**ROW, "AP": 0.5, "AP50": 0.7, "skipped": 2, "overflow": 3}, 300)
    assert "AP 0.5000, AP50 0.7000" in line
    assert line.endswith("2 steps skipped; 3 candidates without a slot")


def test_tensorboard_gets_what_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class SummaryWriter:
        def __init__(self, folder: str) -> None:
            calls.append(folder)

        def add_scalar(self, *scalar: Any) -> None:
            calls.append(scalar)

        def close(self) -> None:
            calls.append("closed")

    module = SimpleNamespace(SummaryWriter=SummaryWriter)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    board = TensorBoard(tmp_path)
    board.on_epoch(ROW, None)
    board.on_end(Result(tmp_path, 3, 1, 0.5, {}, {}, 0.1, "done"))
    assert calls[0] == str(tmp_path)
    assert ("lr", 0.01, 3) in calls
    assert not any(call[0] == "AP" for call in calls[1:-1])
    assert calls[-1] == "closed"


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.on_epoch(ROW, None)
    board.on_epoch({**ROW, "epoch": 4.0, "AP": 0.5}, None)
    board.on_end(Result(tmp_path, 4, 1, 0.5, {}, {}, 0.1, "done"))
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("AP")] == [(4, 0.5)]
    assert [e.step for e in events.Scalars("box")] == [3, 4]
