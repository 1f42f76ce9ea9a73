import errno
import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train.conftest import SIZE
from yolov7.checkpoint import load_model, read_metadata, save_model
from yolov7.cli.train import run
from yolov7.dataset import load_data
from yolov7.errors import UserError
from yolov7.evaluate import Settings, evaluate
from yolov7.model import create_model
from yolov7.network import Network
from yolov7.train import loop
from yolov7.train.loop import Run, train
from yolov7.train.options import Train
from yolov7.train.report import Callback, CsvWriter, Result, read_rows
from yolov7.train.state import load_state


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "can_plot", lambda: False)


def end_state(result: Result) -> dict[str, Tensor]:
    """Weights, moving average, momenta and pending gradients of a run."""
    state = load_state(result.folder)
    tensors = {f"{k}.{n}": t for k in ("model", "ema", "gradients") for n, t in state[k].items()}
    for i, entry in state["optimizer"]["state"].items():
        tensors |= {f"optimizer.{i}.{n}": t for n, t in entry.items() if isinstance(t, Tensor)}
    return tensors


def assert_same(a: Result, b: Result) -> None:
    left, right = end_state(a), end_state(b)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    rows = [read_rows(result.folder / "results.csv") for result in (a, b)]
    for x, y in zip(*rows, strict=True):
        for name in ("epoch", "lr", "box", "objectness", "classes", "AP"):
            assert x[name] == pytest.approx(y[name], nan_ok=True, abs=0)


class StoppedError(Exception):
    pass


def interrupt(monkeypatch: pytest.MonkeyPatch, options: Train, batches: int) -> None:
    """Run until a number of batches is done, and die there."""
    original = Run._train_batch

    def die(self: Run, batch: Any) -> dict[str, Tensor]:
        if self.step == batches:
            raise StoppedError
        return original(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_train_batch", die)
        with pytest.raises(StoppedError):
            train(options)


VARIATIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "accumulating": {"set": {"warmup_epochs": 0.0}, "epochs": 10, "val_every": 100},
    "varied": {
        "image_weights": True,
        "multi_scale": True,
        "optimizer": "adam",
        "set": {"mixup": 0.5, "mosaic": 0.7},
    },
}


@pytest.mark.parametrize("name", VARIATIONS)
def test_resumption_is_exact(name: str, options: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    options = replace(options, **{"epochs": 3, **VARIATIONS[name]})
    whole = train(replace(options, name="whole"))
    interrupt(monkeypatch, options, batches=3)
    folder = Path(options.project) / "run"
    resumed = train(Train(resume=str(folder), device="cpu", workers=0))
    assert resumed.epochs == options.epochs
    assert_same(whole, resumed)


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from yolov7.train import loop, state
from yolov7.train.options import Train
writes = 0
def kill(descriptor):
    global writes
    writes += 1
    if writes == {write}:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = kill
loop.can_plot = lambda: False
loop.train(Train(**{options}))
"""


def test_sigkill_while_the_state_is_written(options: Train) -> None:
    """The fourth file that is synchronised: weights and state of the first epoch, of the second."""
    options = replace(options, val_every=100, epochs=3)
    whole = train(replace(options, name="whole"))
    code = KILLED.format(write=4, options=asdict(options))
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    folder = Path(options.project) / "run"
    assert load_state(folder)["epoch"] == 1
    assert_same(whole, train(Train(resume=str(folder), device="cpu", workers=0)))


def test_a_damaged_state_falls_back_to_the_previous_one(options: Train) -> None:
    result = train(options)
    state = result.folder / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    assert load_state(result.folder)["epoch"] == 1
    (result.folder / "state.previous.pt").unlink()
    with pytest.raises(UserError, match=r"cannot be resumed: state.pt is damaged"):
        load_state(result.folder)


def test_a_full_disk_leaves_the_state_before(
    options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(options)

    def full(state: dict[str, Any], file: Any) -> None:
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"No space left on device.*--resume"):
            train(Train(resume=str(result.folder), epochs=3, device="cpu", workers=0))
    assert load_state(result.folder)["epoch"] == 2
    assert sorted(p.name for p in result.folder.glob("state*")) == ["state.previous.pt", "state.pt"]


def test_a_disk_that_fills_between_epochs_is_reported(
    options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.csv")

    monkeypatch.setattr(CsvWriter, "on_epoch", full)
    with pytest.raises(UserError, match=r"No space left on device: 'results.csv': the last"):
        run(options)
    assert load_state(Path(options.project) / "run")["epoch"] == 1


def test_finished_runs_can_be_extended(options: Train) -> None:
    result = train(options)
    with pytest.raises(UserError, match="has finished its 2 epochs: give more --epochs"):
        train(Train(resume=str(result.folder), device="cpu"))
    longer = train(Train(resume=str(result.folder), epochs=4, device="cpu", workers=0))
    rows = read_rows(result.folder / "results.csv")
    assert longer.epochs == 4
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]


def test_the_run_folder_explains_itself(
    options: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    torch.set_num_threads(1)
    file = Path(options.project).parent / "result.json"
    assert run(replace(options, json=str(file))) == 0
    folder = Path(options.project) / "run"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert names >= {
        "arguments.json",
        "results.csv",
        "results.png",
        "labels.png",
        "confusion_matrix.png",
        "PR_curve.png",
        "train_batch0.jpg",
        "train_batch1.jpg",
        "val_samples.jpg",
        "state.pt",
        "weights/last.safetensors",
        "weights/best.safetensors",
    }
    result = json.loads(file.read_text())
    assert result["folder"] == str(folder)
    assert result["epochs"] == 2
    arguments = json.loads((folder / "arguments.json").read_text())
    assert arguments["options"]["imgsz"] == SIZE
    assert arguments["hyper-parameters"]["cls"] == 0.5  # the preset of tiny
    picture = cv2.imread(str(folder / "train_batch0.jpg"))
    assert picture is not None
    assert picture.shape == (2 * SIZE, 2 * SIZE, 3)
    output = capsys.readouterr().out
    assert "epoch 2/2: box" in output
    assert "waiting for data" in output
    about = read_metadata(folder / "weights" / "last.safetensors")
    assert (about["epoch"], about["names"]) == (2, ["red", "blue"])


def test_evaluation_is_that_of_val(options: Train) -> None:
    result = train(options)
    network = Network(load_model(result.folder / "weights" / "last.safetensors"), device="cpu")
    dataset = load_data(options.data, "val")
    stats = evaluate(network, dataset, Settings(imgsz=SIZE)).stats
    assert {name: result.stats[name] for name in stats} == pytest.approx(stats, abs=1e-6)
    assert all(result.stats[f"val_{term}"] > 0 for term in ("box", "objectness", "classes"))


FORMS: dict[str, dict[str, Any]] = {
    "auxiliary": {"variant": "yolov7-w6", "depth": 0.5},
    "plain loss": {"plain_loss": True},
    "rectangular": {"rect": True},
    "bf16": {"precision": "bf16"},
    "automatic batch": {"batch": 0},
    "clipped, ram": {"clip": 0.5, "cache": "ram", "linear_lr": True},
}


@pytest.mark.parametrize("name", FORMS)
def test_forms_of_training(name: str, options: Train) -> None:
    result = train(replace(options, epochs=1, **FORMS[name]))
    (row,) = read_rows(result.folder / "results.csv")
    assert all(np.isfinite(row[term]) for term in ("box", "objectness", "classes"))
    assert row["matches"] > 0
    assert row["skipped"] == row["overflow"] == 0


def test_losses_fall(options: Train) -> None:
    hyper = {"warmup_epochs": 0, "lr0": 0.1, "mosaic": 0, "scale": 0.1, "translate": 0.05}
    result = train(replace(options, epochs=10, batch=64, val_every=100, set=hyper))
    first, *_, last = read_rows(result.folder / "results.csv")
    assert last["box"] < 0.75 * first["box"]
    assert last["classes"] < 0.85 * first["classes"]


def poison(monkeypatch: pytest.MonkeyPatch, batches: range) -> None:
    """Make the classification loss NaN in some batches."""
    original = Run._train_batch

    def train_batch(self: Run, batch: Any) -> dict[str, Tensor]:
        nan = self.step in batches
        self.weights = replace(self.weights, classes=float("nan") if nan else 0.01)
        return original(self, batch)

    monkeypatch.setattr(Run, "_train_batch", train_batch)


def test_a_bad_step_is_named_and_skipped(
    options: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    poison(monkeypatch, range(1, 2))
    result = train(options)
    assert read_rows(result.folder / "results.csv")[-1]["skipped"] == 1
    assert "batch 1: gradient of " in capsys.readouterr().out
    assert all(t.isfinite().all() for t in end_state(result).values())
    assert load_state(result.folder)["updates"] == 3


def test_a_diverged_run_ends(options: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    poison(monkeypatch, range(1, 1000))
    with pytest.raises(UserError, match="20 steps in a row without finite gradients"):
        train(replace(options, epochs=50, val_every=100))


def test_broken_statistics_are_restored(options: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Run._train_batch

    def overflow(self: Run, batch: Any) -> dict[str, Tensor]:
        if self.step == 1:
            self.weights = replace(self.weights, box=float("inf"))
            for name, buffer in self.model.named_buffers():
                if name.endswith("running_var"):
                    buffer.fill_(float("inf"))
        return original(self, batch)

    monkeypatch.setattr(Run, "_train_batch", overflow)
    interrupt(monkeypatch, options, batches=3)
    state = load_state(Path(options.project) / "run")
    assert all(t.isfinite().all() for t in state["model"].values())


def test_frozen_parts_stay(options: Train, tmp_path: Path) -> None:
    model = create_model("yolov7-tiny", 2, width=0.125)
    weights = tmp_path / "start.safetensors"
    save_model(model, weights)
    result = train(
        replace(
            options,
            weights=str(weights),
            width=1.0,
            freeze=("stem", "backbone.0"),
            set={"warmup_epochs": 0.0, "lr0": 0.1},
            batch=32,
        )
    )
    before, after = model.state_dict(), load_state(result.folder)["model"]
    for name, tensor in before.items():
        frozen = name.startswith(("stem.", "backbone.0."))
        if name != "head.anchors" and "num_batches" not in name:
            assert torch.equal(tensor, after[name]) == frozen, name


class Recorder(Callback):
    def __init__(self) -> None:
        self.calls: list[str] = []

    def on_start(self, folder: Path, options: dict[str, Any]) -> None:
        self.calls.append(f"start {folder.name} {options['epochs']}")

    def on_epoch(self, row: dict[str, float], validation: Any) -> None:
        self.calls.append(f"epoch {row['epoch']} {validation is not None}")

    def on_end(self, result: Result) -> None:
        self.calls.append(result.stopped)


def test_callbacks_and_the_time_limit(options: Train) -> None:
    recorder = Recorder()
    train(replace(options, epochs=9, hours=1e-9, val_every=2), [recorder])
    assert recorder.calls == ["start run 9", "epoch 1 False", "1e-09 hours have passed"]


def test_patience(options: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.3, 0.3, 0.2, 0.1])
    monkeypatch.setattr(loop, "fitness", lambda _: next(scores))
    result = train(replace(options, epochs=9, patience=2))
    assert (result.epochs, result.best_epoch, result.fitness) == (4, 2, 0.3)
    assert result.stopped == "no better model in 2 epochs"
    best = read_metadata(result.folder / "weights" / "best.safetensors")
    assert best["epoch"] == 2


def test_weights_of_other_classes_start_with_a_new_head(
    options: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model("yolov7-tiny", 7, width=0.125)
    save_model(model, tmp_path / "seven.safetensors")
    result = train(
        replace(options, weights=str(tmp_path / "seven.safetensors"), width=1.0, epochs=1)
    )
    assert "knows 7 classes, the data 2: the detection layers start anew" in capsys.readouterr().out
    trained = load_model(result.folder / "weights" / "last.safetensors")
    assert trained.names == ["red", "blue"]
    distance = (trained.stem[0].conv.weight - model.stem[0].conv.weight).abs().max()  # type: ignore[union-attr, operator]  # modules
    assert distance < 1e-3


def test_wrong_use_is_explained(options: Train, tmp_path: Path) -> None:
    deploy = tmp_path / "deploy.safetensors"
    save_model(create_model("yolov7-tiny", 2, width=0.125, form="deploy"), deploy)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"weights": str(deploy), "width": 1.0}, "is in deploy form, which cannot be trained"),
        ({"weights": str(deploy)}, "--width, .* from scratch"),
        ({"data": ""}, "give --data"),
        ({"variant": "yolov9"}, "unknown model 'yolov9'"),
        ({"imgsz": 70}, "no multiple of the stride 32: try 64"),
        ({"freeze": ("trunk",)}, "--freeze trunk: no such part of the network: stem"),
        ({"set": {"lr": 0.1}}, "unknown hyper-parameter 'lr'"),
        ({"variant": "yolov7-w6", "plain_loss": True}, "leave out --plain-loss"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"resume": str(tmp_path)}, "no state.pt there"),
        ({"batch": -1}, "--batch -1"),
    ]
    for change, message in cases:
        with pytest.raises(UserError, match=message):
            train(replace(options, **change))


def test_labels_without_a_single_box_are_refused(shapes: Path, options: Train) -> None:
    root = Path(options.project).parent / "empty"
    for split in ("train", "val"):
        for part in ("images", "labels"):
            (root / part / split).mkdir(parents=True)
        cv2.imwrite(str(root / "images" / split / "a.png"), np.zeros((32, 32, 3), np.uint8))
    (root / "data.yaml").write_text(shapes.read_text())
    with pytest.raises(UserError, match="has 1 images but not a single box"):
        train(replace(options, data=str(root / "data.yaml")))
