import errno
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from yolov7.cli.train import run
from yolov7.errors import UserError
from yolov7.train import loop
from yolov7.train.loop import train
from yolov7.train.options import Train
from yolov7.train.plots import Plotter
from yolov7.train.report import CsvWriter, Result, read_rows
from yolov7.train.state import load_state
from yolov7.train.step import Progress, Step


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
    original = Step.__call__

    def die(self: Step, batch: Any, progress: Progress) -> dict[str, Tensor]:
        if progress.step == batches:
            raise StoppedError
        return original(self, batch, progress)

    with monkeypatch.context() as patch:
        patch.setattr(Step, "__call__", die)
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


@pytest.fixture(scope="module")
def run_once(shapes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was stopped after its first epoch."""
    folder = tmp_path_factory.mktemp("once")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("YOLOV7_CACHE", str(folder / "cache"))
        patch.setattr(loop, "can_plot", lambda: False)
        options = Train(
            data=str(shapes),
            imgsz=64,
            width=0.125,
            epochs=1,
            batch=4,
            workers=0,
            device="cpu",
            project=str(folder),
        )
        return train(options).folder


KILLED = """
import os, signal, sys, torch
torch.set_num_threads(1)
from yolov7.train import loop, state
from yolov7.train.options import Train
from yolov7.train.plots import Plotter
writes = 0
def kill(descriptor):
    global writes
    writes += os.readlink(f"/proc/self/fd/{{descriptor}}").endswith(".pt")
    if writes == {write}:
        os.kill(os.getpid(), signal.SIGKILL)
os.fsync = kill
loop.can_plot = lambda: False
loop.train(Train(**{options}))
"""


@pytest.mark.parametrize("epoch", [0, 1])
def test_sigkill_while_the_state_is_written(epoch: int, options: Train) -> None:
    """While the state of the epoch after `epoch` is synchronised; the first is of the start."""
    options = replace(options, val_every=100, epochs=3)
    whole = train(replace(options, name="whole"))
    code = KILLED.format(write=epoch + 2, options=asdict(options))
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=120)
    assert done.returncode == -signal.SIGKILL
    folder = Path(options.project) / "run"
    assert load_state(folder)["progress"]["epoch"] == epoch
    assert list(folder.glob(".yolov7*"))
    assert_same(whole, train(Train(resume=str(folder), workers=0)))
    assert sorted(p.name for p in folder.glob("state*")) == ["state.previous.pt", "state.pt"]
    assert not list(folder.glob(".yolov7*"))


def test_a_damaged_state_falls_back_to_the_previous_one(options: Train) -> None:
    result = train(options)
    state = result.folder / "state.pt"
    state.write_bytes(state.read_bytes()[:1000])
    assert load_state(result.folder)["progress"]["epoch"] == 1
    (result.folder / "state.previous.pt").unlink()
    with pytest.raises(UserError, match=r"cannot be resumed: state.pt is damaged"):
        load_state(result.folder)


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ("progress", "options", "hyper", "model", "optimizer")),
        *({"progress": {"epoch": epoch}} for epoch in ("1", 1.5, None)),
        *({"hyper": {"lr0": rate}} for rate in ("x", float("nan"))),
        *({"options": {"batch": batch}} for batch in ("4", -1)),
        *({"options": {"freeze": 1}}, {"model": {"stem.0.conv.weight": torch.zeros(1)}}),
        {"gradients": [1]},
        {"updates": "many"},
        {"image_weights": torch.ones(1)},
        {"image_weights": torch.full((8,), torch.nan)},
    ],
    ids=lambda change: str(change)[:40],
)
def test_a_state_of_other_values_is_one_line(
    change: dict[str, Any], run_once: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run_once, tmp_path / "run"))
    state = load_state(folder)
    for name, value in change.items():
        state[name] = {**state[name], **value} if isinstance(value, dict) else value
    torch.save(state, folder / "state.pt")
    with pytest.raises(UserError) as caught:
        train(Train(resume=str(folder), epochs=2, device="cpu", workers=0))
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model", "progress", "images", "data", "scaler", "updates"])
def test_a_state_without_a_key_is_one_line(name: str, run_once: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run_once, tmp_path / "run"))
    state = load_state(folder)
    del state[name]
    torch.save(state, folder / "state.pt")
    with pytest.raises(UserError, match=rf"is damaged, or of another version .*{name}"):
        train(Train(resume=str(folder), epochs=2, device="cpu", workers=0))


def test_a_full_disk_leaves_the_state_before(
    options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = train(options)

    def full(state: dict[str, Any], file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(UserError, match=r"No space left on device.*make room"):
            train(Train(resume=str(result.folder), epochs=3, device="cpu", workers=0))
        with pytest.raises(UserError, match=r"No space left on device\): make room, then start"):
            train(replace(options, name="new"))
    assert load_state(result.folder)["progress"]["epoch"] == 2
    assert sorted(p.name for p in result.folder.glob("state*")) == ["state.previous.pt", "state.pt"]


def test_a_disk_that_fills_between_epochs_costs_no_row(
    options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = CsvWriter.on_epoch

    def full(self: CsvWriter, row: dict[str, float], validation: Any) -> None:
        if row["epoch"] == 2:
            with self.path.open("a") as file:
                file.write("2,1e-")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "results.csv")
        original(self, row, validation)

    whole = train(replace(options, name="whole"))
    with monkeypatch.context() as patch:
        patch.setattr(CsvWriter, "on_epoch", full)
        with pytest.raises(UserError, match=r"results.csv: No space left on device"):
            run(options)
    folder = Path(options.project) / "run"
    assert load_state(folder)["progress"]["epoch"] == 1
    assert_same(whole, train(Train(resume=str(folder), workers=0)))


def test_a_run_goes_on_where_it_ran_unless_told(
    options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def resolve_device(name: str) -> torch.device:
        asked.append(name)
        return torch.device("cpu")

    monkeypatch.setattr(loop, "resolve_device", resolve_device)
    folder = train(replace(options, epochs=1)).folder
    for epochs, device in enumerate(("auto", "cuda:1", "auto"), start=2):
        train(Train(resume=str(folder), epochs=epochs, device=device, workers=0))
    assert asked == ["cpu", "cpu", "cuda:1", "cuda:1"]


@pytest.mark.parametrize("step", [0, 1])
def test_a_run_that_dies_in_its_first_epoch_can_be_resumed(
    step: int,
    options: Train,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = train(replace(options, name="whole"))
    monkeypatch.setattr(Step, "__call__", full_after(step))
    with pytest.raises(UserError, match="the disk is full"):
        train(options)
    folder = Path(options.project) / "run"
    assert f"what was saved last is kept: yolov7 train --resume {folder}" in capsys.readouterr().out
    assert not (folder / "weights" / "best.safetensors").exists()
    monkeypatch.undo()
    monkeypatch.setattr(loop, "can_plot", lambda: False)
    assert_same(whole, train(Train(resume=str(folder), workers=0)))


def full_after(step: int) -> Any:
    original = Step.__call__

    def call(self: Step, batch: Any, progress: Progress) -> dict[str, Tensor]:
        if progress.step == step:
            raise UserError("the disk is full")
        return original(self, batch, progress)

    return call


def test_what_is_given_beside_resume_is_taken_or_refused(
    options: Train, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(train(replace(options, epochs=1)).folder)
    refused: list[tuple[dict[str, Any], str]] = [
        ({"batch": 2}, "with --batch 4: leave it out, or begin a new run with --weights .*last"),
        ({"imgsz": 96}, "with --imgsz 64"),
        ({"set": {"lr0": 0.5}}, "with --set {'warmup_epochs': 100.0}"),
        ({"freeze": ("stem",)}, "with --freeze"),
        ({"name": "other"}, "with --name run"),
        ({"data": "nonsense", "epochs": 2}, "nonsense .*if the data has moved, name it with"),
    ]
    for change, message in refused:
        with pytest.raises(UserError, match=message):
            train(Train(resume=folder, **change))
    capsys.readouterr()
    train(Train(resume=folder, epochs=2, workers=0, batch=4, patience=7, val_every=2))
    output = capsys.readouterr().out
    assert output.startswith(
        "resumed after epoch 1, --epochs 2 instead of 1, --patience 7 instead of None, --val-every "
        "2 instead of 1\n"
    )
    assert "the learning rate goes on at " in output


def test_data_that_moved_is_found_and_data_that_changed_is_told(
    options: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, other = (tmp_path / name for name in ("first", "second", "other"))
    shutil.copytree(Path(options.data).parent, first)
    folder = str(train(replace(options, data=str(first), epochs=1)).folder)
    first.rename(second)
    with pytest.raises(UserError, match="if the data has moved, name it with --data"):
        train(Train(resume=folder, epochs=2, workers=0))
    train(Train(resume=folder, epochs=2, workers=0, data=str(second)))
    assert "the run began with" not in capsys.readouterr().out

    label = second / "labels" / "train" / "000.txt"
    label.write_text(label.read_text().replace("0 0.", "1 0."))
    train(Train(resume=folder, epochs=3, workers=0))
    note = "warning: images or labels are not those that the run began with"
    assert note in capsys.readouterr().out

    shutil.copytree(second, other)
    spec = other / "data.yaml"
    spec.write_text(spec.read_text().replace("red", "pink"))
    with pytest.raises(UserError, match=r"learns .*red.*, the data has .*pink"):
        train(Train(resume=folder, epochs=4, workers=0, data=str(other)))


def test_a_run_that_ended_before_its_pictures_gets_them(
    options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "can_plot", lambda: True)
    original = Plotter.on_end
    monkeypatch.setattr(Plotter, "on_end", lambda *_: (_ for _ in ()).throw(StoppedError))
    with pytest.raises(StoppedError):
        train(options)
    monkeypatch.setattr(Plotter, "on_end", original)
    folder = Path(options.project) / "run"
    rows = (folder / "results.csv").read_bytes()
    state = (folder / "state.pt").read_bytes()
    again = Train(resume=str(folder), device="cpu", workers=0)
    assert train(again).epochs == 2
    assert (folder / "results.png").exists()
    assert (folder / "samples.jpg").exists()
    assert (folder / "results.csv").read_bytes() == rows
    assert (folder / "state.pt").read_bytes() == state
    with pytest.raises(UserError, match="has finished its 2 epochs"):
        train(again)


def test_finished_runs_can_be_extended(options: Train) -> None:
    result = train(options)
    with pytest.raises(UserError, match="has finished its 2 epochs: give more --epochs"):
        train(Train(resume=str(result.folder), device="cpu"))
    longer = train(Train(resume=str(result.folder), epochs=4, device="cpu", workers=0))
    rows = read_rows(result.folder / "results.csv")
    assert longer.epochs == 4
    assert [row["epoch"] for row in rows] == [1, 2, 3, 4]
