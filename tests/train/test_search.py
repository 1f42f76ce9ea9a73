import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from yolov7.cli import main
from yolov7.errors import UserError
from yolov7.train import search as module
from yolov7.train.options import Train
from yolov7.train.search import JOURNAL, TABLE, Found, search
from yolov7.train.state import LAST
from yolov7.train.step import DivergedError

pytest.importorskip("optuna", reason="Optuna, the extra search, is missing")

RANGES = {"lr0": (0.001, 0.1), "mixup": (0.0, 0.5)}
Course = Callable[[dict[str, float]], Sequence[float]]


@pytest.fixture
def course(monkeypatch: pytest.MonkeyPatch) -> Callable[[Course], list[Train]]:
    """Replaces training: what the fitness is after each epoch; gives the options of the runs."""
    runs: list[Train] = []

    def start(fitness_of: Course) -> list[Train]:
        def train(options: Train, callbacks: Any, *, data: Any) -> None:
            assert len(data) == 2
            assert not options.data
            runs.append(options)
            print("an epoch")
            folder = Path(options.project) / str(options.name)
            (folder / "weights").mkdir(parents=True)
            (folder / "weights/best.safetensors").touch()
            (folder / LAST).touch()
            for epoch, value in enumerate(fitness_of(options.set), 1):
                (follower,) = callbacks
                stats = SimpleNamespace(stats={"AP": value, "AP50": value})
                follower.on_epoch({"epoch": epoch}, stats)
                follower.on_epoch({"epoch": epoch}, None)  # not evaluated
                if follower.stop:
                    return

        monkeypatch.setattr(module, "train", train)
        return runs

    return start


def near(values: dict[str, float]) -> list[float]:
    """A fitness that is best at a rate of 0.05 without mixup."""
    return [1 - 10 * abs(values["lr0"] - 0.05) - values["mixup"]]


def rows(found: Found) -> list[list[str]]:
    with (found.folder / TABLE).open(newline="") as file:
        return list(csv.reader(file))


def test_the_first_trial_is_the_preset_and_the_best_is_kept(
    options: Train, course: Callable[[Course], list[Train]], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = course(near)
    found = search(options, 12, RANGES)
    assert runs[0].set == {"warmup_epochs": 100.0, "lr0": 0.01, "mixup": 0.05}
    assert all(0.001 <= run.set["lr0"] <= 0.1 and 0 <= run.set["mixup"] <= 0.5 for run in runs)
    assert found.fitness == max(tried.fitness for tried in found.trials) > found.trials[0].fitness
    assert found.values == found.trials[found.best].values
    kept = [path.parent.name for path in found.folder.glob("*/weights")]
    assert kept == [str(found.best)]
    assert not list(found.folder.glob(f"*/{LAST}"))
    head, *table = rows(found)
    assert head == ["trial", "state", "fitness", "lr0", "mixup"]
    assert [int(row[0]) for row in table] == list(range(12))
    assert float(table[found.best][2]) == pytest.approx(found.fitness, abs=1e-6)
    assert "an epoch" not in capsys.readouterr().out
    assert (found.folder / "3.log").read_text() == "an epoch\n"


def test_a_search_goes_on_where_it_stopped(
    options: Train, course: Callable[[Course], list[Train]]
) -> None:
    course(near)
    whole = search(options, 12, RANGES)
    part = search(replace(options, name="part"), 5, RANGES)
    found = search(Train(resume=str(part.folder)), 12)
    assert found.trials == whole.trials
    assert search(Train(resume=str(part.folder)), 12).trials == whole.trials  # nothing to do
    with pytest.raises(UserError, match="with --imgsz 64: leave it out, or begin a new one"):
        search(Train(resume=str(part.folder), imgsz=128), 13)


def test_what_falls_behind_ends_early_and_what_diverges_is_the_worst(
    options: Train, course: Callable[[Course], list[Train]]
) -> None:
    number = iter(range(100))

    def fitness_of(values: dict[str, float]) -> list[float]:
        match next(number):
            case 2:
                raise DivergedError("no number")
            case 11:
                return [0.0] * 30
            case _:
                return [0.01 * epoch for epoch in range(30)]

    runs = course(fitness_of)
    found = search(options, 12, RANGES)
    assert [found.trials[n].state for n in (1, 2, 11)] == ["complete", "diverged", "pruned"]
    assert rows(found)[3][1:3] == ["diverged", "0.000000"]
    assert len(runs) == 12


def test_an_error_ends_the_search_which_goes_on_later(
    options: Train, course: Callable[[Course], list[Train]]
) -> None:
    def broken(values: dict[str, float]) -> list[float]:
        raise UserError("the disk is full")

    course(broken)
    with pytest.raises(UserError, match="the disk is full"):
        search(options, 2, RANGES)
    course(near)
    found = search(Train(resume=f"{options.project}/run"), 2)
    assert [tried.state for tried in found.trials] == ["failed", "complete", "complete"]


@pytest.mark.parametrize(
    ("changes", "ranges", "message"),
    [
        ({"export": "onnx"}, RANGES, "--export: train with what is found"),
        ({}, {"lr0": (0.1, 0.01)}, "--search lr0 0.1 0.01: give the lower end first"),
        ({}, {"lr": (0.1, 0.2)}, "unknown hyper-parameter 'lr'"),
        ({}, {"mixup": (0.0, 2.0)}, "hyper-parameter mixup 2: give 0 to 1"),
        ({}, {"lr0": (0.0, float("inf"))}, "give the lower end first"),
        ({"resume": "none/here"}, None, "none/here: no search: there is no journal.log"),
        ({"epochs": 0}, None, "--epochs 0: give 1 or more"),
        ({"data": "none.yaml"}, None, "none.yaml"),
    ],
)
def test_wrong_input(changes: Any, ranges: Any, message: str, options: Train) -> None:
    with pytest.raises(UserError, match=message):
        search(replace(options, **changes), 1, ranges)
    assert not Path(options.project).exists()


def test_a_search_is_one_process(options: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(UserError, match="a search is one process: start another beside it"):
        search(options, 1, RANGES)


@pytest.mark.parametrize("text", ["", "{}\n", "no json\n", '{"op_code": 99}\n'])
def test_damaged_journals(text: str, options: Train, tmp_path: Path) -> None:
    (tmp_path / JOURNAL).write_text(text)
    with pytest.raises(UserError, match="no journal of a search: "):
        search(replace(options, resume=str(tmp_path)), 1)


def test_on_the_command_line(
    options: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two runs that really train."""
    words = f"--data {options.data} --imgsz 64 --width 0.125 --epochs 1 --batch 4 --workers 0"
    place = f"--project {tmp_path} --name two --json {tmp_path}/found.json --device cpu"
    search = "--trials 2 --search lr0 0.001 0.1"
    assert main(["tune-hyperparameters", *f"{words} {place} {search}".split()]) == 0
    found = json.loads((tmp_path / "found.json").read_text())
    assert [tried["state"] for tried in found["trials"]] == ["complete", "complete"]
    assert f"--set lr0 {found['values']['lr0']:.4g}" in capsys.readouterr().out
    best = tmp_path / "two" / str(found["best"]) / "weights/best.safetensors"
    assert best.is_file()
    assert "epoch 1/1" in (tmp_path / "two/1.log").read_text()
