"""Kept accuracies: how they are measured, how they are shown."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import accuracy
from tests.yolov7.data_sets import yolo_data
from yolov7.checkpoint import save_model
from yolov7.model import create_model
from yolov7.train.options import Train


def row(ap: float) -> dict[str, float]:
    return dict.fromkeys(accuracy.FIGURES, ap)


def test_seeds_of_a_run_get_a_mean() -> None:
    rows = {"a run, seed 0": row(0.5), "a run, seed 1": row(0.7), "other": row(0.2)}
    lines = list(accuracy.table({**rows, "alone, seed 3": row(0.1)}))
    assert [line.split("|")[1].strip() for line in lines[2:]] == [
        *("a run, seed 0", "a run, seed 1", "a run, mean", "other", "alone, seed 3"),
    ]
    assert "| a run, mean | 0.60000 |" in lines[4]


def test_main_keeps_figures_options_and_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(accuracy, "KEPT", tmp_path / "accuracy.json")
    monkeypatch.setattr(accuracy, "kept", lambda: {"before": row(0.25)})
    data, weights = yolo_data(tmp_path / "data"), tmp_path / "w.safetensors"
    model = create_model("yolov7-tiny", 2, multiplier=0.1, names=["cell", "dot"]).eval()
    save_model(model, weights, training=asdict(Train(data="/somewhere", seed=7, imgsz=64)))
    words = ["small", "--weights", str(weights), "--data", str(data), "--imgsz", "64"]
    assert accuracy.main(words) == 0
    found = json.loads((tmp_path / "accuracy.json").read_text())
    assert found["before"] == row(0.25)
    small = found["small"]
    assert small["options"] == ["--imgsz", "64"]
    assert small["training"] == {"seed": 7, "imgsz": 64}
    assert set(small["classes"]) == {"cell", "dot"}
    assert all(0 <= small[figure] <= 1 for figure in accuracy.FIGURES)
    assert str(tmp_path) not in json.dumps(found)
    assert "| small |" in capsys.readouterr().out


def test_what_cannot_be_evaluated_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accuracy, "KEPT", tmp_path / "accuracy.json")
    with pytest.raises(SystemExit, match="1"):
        accuracy.main(["nothing", "--data", str(tmp_path / "missing")])
    assert not (tmp_path / "accuracy.json").exists()
