import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.train.test_resume import interrupt
from yolov7.cli.train import run
from yolov7.errors import UserError
from yolov7.train import loop
from yolov7.train.loop import train
from yolov7.train.options import Train
from yolov7.train.report import Callback


def with_test(options: Train, names: str = "[red, blue]") -> Train:
    """Options with a test split, the images of val."""
    root = Path(options.project).parent
    shapes = Path(options.data).parent
    spec = f"path: {shapes}\ntrain: images/train\nval: images/val\ntest: images/val\nnames: {names}"
    (root / "data.yaml").write_text(spec)
    return replace(options, data=str(root / "data.yaml"))


def test_a_run_ends_with_the_figures_of_its_best_weights(
    options: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scores = iter([0.5, 0.3])
    monkeypatch.setattr(loop, "fitness", lambda _: next(scores))
    validations = []

    class Watcher(Callback):
        def on_epoch(self, row: dict[str, float], validation: Any) -> None:  # noqa: ARG002
            validations.append(validation)

    result = train(with_test(options), [Watcher()])
    assert (result.best_epoch, result.epochs) == (1, 2)
    assert result.stats == validations[0].stats != validations[1].stats
    assert result.test == pytest.approx(validations[0].evaluation.stats, abs=1e-6)
    figures = json.loads((result.folder / "results.json").read_text())
    assert (figures["epoch"], figures["val"]["AP"]) == (1, result.stats["AP"])
    assert [row["name"] for row in figures["test"]["per_class"]] == ["red", "blue"]
    output = capsys.readouterr().out
    for split in ("val", "test"):
        assert f"{split}, epoch 1: precision and recall at" in output
    assert "│ blue" in output


@pytest.mark.parametrize(
    ("place", "reason"),
    [
        ("images/none", ".*images/none"),
        ("images/train", "8 of its images were trained on"),
    ],
)
def test_a_test_split_that_cannot_be_evaluated_is_told(
    place: str, reason: str, options: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    given = with_test(options)
    spec = Path(given.data)
    spec.write_text(spec.read_text().replace("test: images/val", f"test: {place}"))
    assert train(replace(given, epochs=1)).test == {}
    assert re.search(f"not evaluated on test: {reason}", capsys.readouterr().out)


def test_what_is_missing_at_the_end_is_made_by_resuming(
    options: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(options).folder
    figures, onnx = folder / "results.json", folder / "weights" / "best.onnx"
    rows, before = (folder / "results.csv").read_bytes(), json.loads(figures.read_text())
    figures.write_text("{")  # half of it
    again = train(Train(resume=str(folder), workers=0))
    after = json.loads(figures.read_text())
    assert {**after["val"], "speed": 0} == {**before["val"], "speed": 0}
    assert (again.epochs, again.stats["AP"]) == (2, after["val"]["AP"])
    assert (folder / "results.csv").read_bytes() == rows
    with pytest.raises(UserError, match="has finished its 2 epochs: give more --epochs"):
        train(Train(resume=str(folder), workers=0))
    assert not onnx.exists()
    assert run(Train(resume=str(folder), workers=0, export="onnx")) == 0
    assert onnx.exists()
    assert "best.onnx" in capsys.readouterr().out
    with pytest.raises(UserError, match="has finished"):
        train(Train(resume=str(folder), workers=0, export="onnx"))


def test_a_run_is_ended_before_its_time(options: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(monkeypatch, replace(options, epochs=9, val_every=9), batches=3)
    folder = Path(options.project) / "run"
    assert not (folder / "weights" / "best.safetensors").exists()
    ended = train(Train(resume=str(folder), epochs=1, workers=0))
    assert (ended.epochs, ended.best_epoch, ended.stopped) == (1, 0, "all epochs are done")
    assert ended.stats["AP"] >= 0


def test_a_format_is_checked_before_the_run(
    options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="format tflite: choose from onnx"):
        train(replace(options, export="tflite"))
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match="onnxscript is not installed"):
        train(replace(options, export="onnx"))
    assert not Path(options.project).exists()
