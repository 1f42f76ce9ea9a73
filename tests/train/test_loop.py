import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
import yaml
from torch import Tensor

from tests.train.conftest import SIZE
from tests.train.test_resume import end_state, interrupt
from yolov7.checkpoint import load_model, read_metadata, save_model
from yolov7.cli.train import run
from yolov7.dataset import load_data
from yolov7.engine.choose import AnyNetwork, Runtime, open_network
from yolov7.errors import UserError
from yolov7.evaluate import Settings, evaluate
from yolov7.model import YOLOv7, create_model
from yolov7.train import autobatch, loop, validation
from yolov7.train.distributed import Ranks
from yolov7.train.loader import Batch
from yolov7.train.loop import Run, train
from yolov7.train.options import Train
from yolov7.train.report import Callback, Result, read_rows
from yolov7.train.scene import Scene
from yolov7.train.state import load_state
from yolov7.train.step import Progress, Step
from yolov7.train.validation import Validation


def test_a_result_that_cannot_be_written_is_found_out_before_the_run(options: Train) -> None:
    file = Path(options.data) / "result.json"
    with pytest.raises(UserError, match=r"data\.yaml/result\.json: cannot be written"):
        run(replace(options, json=str(file)))
    assert not Path(options.project).exists()


def test_the_run_folder_explains_itself(
    options: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.undo()
    torch.set_num_threads(1)
    file = Path(options.project).parent / "new" / "result.json"
    assert run(replace(options, json=str(file))) == 0
    folder = Path(options.project) / "run"
    names = {path.relative_to(folder).as_posix() for path in folder.rglob("*")}
    assert names >= {
        "arguments.yaml",
        "results.csv",
        "results.png",
        "labels.png",
        "confusion_matrix.png",
        "PR_curve.png",
        "train_batch0.jpg",
        "train_batch1.jpg",
        "samples.jpg",
        "results.json",
        "state.pt",
        "weights/last.safetensors",
        "weights/best.safetensors",
    }
    result = json.loads(file.read_text())
    assert result["folder"] == str(folder)
    assert result["epochs"] == 2
    arguments = yaml.safe_load((folder / "arguments.yaml").read_text())
    assert arguments["options"]["imgsz"] == SIZE
    assert arguments["hyper-parameters"]["cls"] == 0.5  # the preset of tiny
    picture = cv2.imread(str(folder / "train_batch0.jpg"))
    assert picture is not None
    assert picture.shape == (2 * SIZE, 2 * SIZE, 3)
    output = capsys.readouterr().out
    assert f"2.2 M parameters, on cpu in float32\n8 images of {SIZE} pixels (1 without" in output
    assert (
        "2 epochs of 2 batches of 4 images, a step every 2 batches; warm-up 200 batches;" in output
    )
    assert f" 0 workers; into {folder}\n" in output
    assert "epoch 2/2: box" in output
    assert "waiting for data" in output
    about = read_metadata(folder / "weights" / "last.safetensors")
    assert (about["epoch"], about["names"]) == (2, ["red", "blue"])


def test_evaluation_is_that_of_val(options: Train) -> None:
    result = train(options)
    network = open_network(
        Runtime(weights=load_model(result.folder / "weights" / "best.safetensors"), device="cpu")
    )
    dataset = load_data(options.data, "val")
    stats = evaluate(network, dataset, Settings(imgsz=SIZE)).stats
    assert {name: result.stats[name] for name in stats} == pytest.approx(stats, abs=1e-6)
    assert all(result.stats[f"val_{term}"] > 0 for term in ("box", "objectness", "classes"))


FORMS: dict[str, dict[str, Any]] = {
    "auxiliary": {"variant": "yolov7-w6", "depth": 0.5},
    "plain loss": {"plain_loss": True},
    "rectangular": {"rect": True},
    "bf16": {"precision": "bf16"},
    "adamw": {"optimizer": "adamw", "set": {"lr0": 1e-3}},
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
    original = Step.__call__

    def step(self: Step, batch: Any, progress: Progress) -> dict[str, Tensor]:
        nan = progress.step in batches
        self.weights = replace(self.weights, classes=float("nan") if nan else 0.01)
        return original(self, batch, progress)

    monkeypatch.setattr(Step, "__call__", step)


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
    original = Step.__call__

    def overflow(self: Step, batch: Any, progress: Progress) -> dict[str, Tensor]:
        if progress.step == 1:
            self.weights = replace(self.weights, box=float("inf"))
            for name, buffer in self.model.named_buffers():
                if name.endswith("running_var"):
                    buffer.fill_(float("inf"))
        return original(self, batch, progress)

    monkeypatch.setattr(Step, "__call__", overflow)
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

    def on_start(self, folder: Path, options: dict[str, Any], model: YOLOv7) -> None:  # noqa: ARG002
        self.weights = folder / "weights"
        self.calls.append(f"start {folder.name} {options['epochs']}")

    def on_epoch(self, row: dict[str, float], validation: Any) -> None:
        saved = read_metadata(self.weights / "last.safetensors")["epoch"]
        self.calls.append(f"epoch {row['epoch']} {saved} {validation is not None}")

    def on_end(self, result: Result) -> None:
        self.calls.append(result.stopped)


def test_callbacks_and_the_time_limit(options: Train) -> None:
    recorder = Recorder()
    result = train(replace(options, epochs=9, hours=1e-9, val_every=2), [recorder])
    assert recorder.calls == ["start run 9", "epoch 1 1 True", "1e-09 hours have passed"]
    assert (result.folder / "weights" / "best.safetensors").is_file()


class Stopper(Callback):
    """Ends a run by what it sees of its batches and its model."""

    def __init__(self) -> None:
        self.boxes: list[float] = []

    def on_start(self, folder: Path, options: dict[str, Any], model: YOLOv7) -> None:  # noqa: ARG002
        self.model, self.weight = model, model.stem[0].conv.weight.detach().clone()  # type: ignore[union-attr, operator]  # modules

    def on_batch(self, batch: Batch, terms: dict[str, Tensor]) -> None:
        assert len(batch.images) == 4
        self.boxes.append(float(terms["box"].detach()))
        same = torch.equal(self.model.stem[0].conv.weight, self.weight)  # type: ignore[union-attr, arg-type]  # modules
        assert same == (len(self.boxes) == 1)  # the first step of a warm-up has a rate of 0
        if len(self.boxes) == 3:
            self.stop = "enough was seen"


def test_a_callback_sees_batches_and_the_model_and_ends_a_run(options: Train) -> None:
    stopper = Stopper()
    result = train(replace(options, epochs=9, val_every=9), [Recorder(), stopper])
    assert (result.stopped, result.epochs, len(stopper.boxes)) == ("enough was seen", 2, 4)
    assert "AP" in result.stats  # the last epoch is evaluated
    assert load_state(result.folder)["progress"]["epoch"] == 2


class GoodEnough(Callback):
    """Ends a run at its first evaluation, or in an epoch that has none."""

    def __init__(self, *, evaluated: bool) -> None:
        self.evaluated = evaluated

    def on_epoch(self, row: dict[str, float], validation: Validation | None) -> None:  # noqa: ARG002
        if (validation is not None) == self.evaluated:
            self.stop = "good enough"


def test_a_run_ends_with_the_epoch_after_which_a_callback_says_so(options: Train) -> None:
    result = train(replace(options, epochs=5), [GoodEnough(evaluated=True)])
    assert (result.stopped, result.epochs) == ("good enough", 1)
    # Without an evaluation one more epoch, which has one.
    again = replace(options, epochs=5, val_every=4, name="again")
    result = train(again, [GoodEnough(evaluated=False)])
    assert (result.stopped, result.epochs) == ("good enough", 2)
    assert "AP" in result.stats


def test_weights_are_kept_every_so_many_epochs(options: Train) -> None:
    result = train(replace(options, epochs=5, save_every=2, val_every=9))
    kept = sorted(path.name for path in (result.folder / "weights").glob("epoch*"))
    assert kept == ["epoch2.safetensors", "epoch4.safetensors"]
    assert read_metadata(result.folder / "weights" / kept[0])["epoch"] == 2


def test_a_share_of_the_images_and_one_class(options: Train) -> None:
    few = replace(options, epochs=1, fraction=0.5, single_class=True, accumulate=1)
    result = train(few)
    state = load_state(result.folder)
    assert (state["images"], state["updates"], state["progress"]["step"]) == (4, 1, 1)
    model = load_model(result.folder / "weights" / "last.safetensors")
    assert (model.names, model.head.num_classes) == (["object"], 1)


def test_the_time_limit_also_counts_the_evaluation(
    options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 3.0])  # start, trained, evaluated
    monkeypatch.setattr(loop, "perf_counter", lambda: next(clock))
    result = train(replace(options, epochs=9, hours=2 / 3600))
    assert (result.epochs, result.hours) == (1, 3 / 3600)


def test_patience(options: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.3, 0.3, 0.2, 0.1])
    monkeypatch.setattr(loop, "fitness", lambda _: next(scores))
    result = train(replace(options, epochs=9, patience=2))
    assert (result.epochs, result.best_epoch, result.fitness) == (4, 2, 0.3)
    assert result.stopped == "no better model in 2 epochs"
    best = read_metadata(result.folder / "weights" / "best.safetensors")
    assert best["epoch"] == 2


def test_patience_counts_from_the_first_thing_that_was_found(
    options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = iter([0.0, 0.0, 0.0, 0.0, 0.01, 0.0, 0.0, 0.0])
    monkeypatch.setattr(loop, "fitness", lambda _: next(scores))
    result = train(replace(options, epochs=9, patience=2))
    assert (result.epochs, result.best_epoch) == (7, 5)


def test_patience_waits_for_an_evaluation(options: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    scores = iter([0.1, 0.3, 0.2])
    monkeypatch.setattr(loop, "fitness", lambda _: next(scores))
    result = train(replace(options, epochs=20, patience=2, val_every=3))
    assert (result.epochs, result.best_epoch) == (9, 6)


def test_an_automatic_batch_fits_the_largest_images(
    options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []

    def largest_batch(_: Any, __: Any, size: int, *___: Any) -> int:
        sizes.append(size)
        return 4

    monkeypatch.setattr(autobatch, "largest_batch", largest_batch)
    for multi_scale in (False, True):
        Run(replace(options, batch=0, multi_scale=multi_scale), torch.device("cpu"), Ranks(), {})
    assert sizes == [64, 96]


def test_weights_of_other_classes_start_with_a_new_head(
    options: Train, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = create_model("yolov7-tiny", 7, width=0.125)
    save_model(model, tmp_path / "seven.safetensors")
    result = train(
        replace(options, weights=str(tmp_path / "seven.safetensors"), width=1.0, epochs=1)
    )
    assert (
        "the model knows 7 classes, the data 2: the detection layers start anew"
        in capsys.readouterr().out
    )
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
        ({"variant": "yolov9"}, "no variant 'yolov9'"),
        ({"imgsz": 99999}, "imgsz is 99999: give 1 to "),
        ({"freeze": ("trunk",)}, "--freeze trunk: no such part of the network: stem"),
        ({"set": {"lr": 0.1}}, "unknown hyper-parameter 'lr'"),
        ({"variant": "yolov7-w6", "plain_loss": True}, "leave out --plain-loss"),
        ({"precision": "fp16"}, "fp16 needs a GPU"),
        ({"resume": str(tmp_path)}, "no state.pt there"),
        ({"batch": -1}, "--batch -1: give 0 or more"),
        ({"fraction": 1.5}, "--fraction 1.5: give 1 or less"),
        ({"accumulate": 0}, "--accumulate 0: give 1 or more"),
        ({"imgsz": 0}, "--imgsz 0: give 1 or more"),
        ({"epochs": 0}, "--epochs 0: give 1 or more"),
        ({"epochs": -1}, "--epochs -1: give 1 or more"),
        ({"clip": -1.0}, "--clip -1.0: give 0 or more"),
        ({"clip": float("nan")}, "--clip nan: give 0 or more"),
        ({"patience": 0}, "--patience 0: give 1 or more"),
        ({"hours": -0.5}, "--hours -0.5: give 0 or more"),
        ({"val_every": 0}, "--val-every 0: give 1 or more"),
        ({"workers": -1}, "--workers -1: give 0 or more"),
        ({"seed": -1}, "--seed -1: give 0 or more"),
        ({"seed": 99999999999999999999}, "--seed 9{20}: give 9223372036854775807 or less"),
        ({"resume": "none", "workers": -1}, "--workers -1: give 0 or more"),
        ({"set": {"lr0": -0.01}}, "hyper-parameter lr0 -0.01: give 0 or more"),
        ({"set": {"mosaic": 5.0}}, "hyper-parameter mosaic 5: give 0 to 1"),
        ({"set": {"fliplr": 1.5}}, "hyper-parameter fliplr 1.5: give 0 to 1"),
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
    with pytest.raises(UserError, match="the 1 images to train on have not a single box"):
        train(replace(options, data=str(root / "data.yaml")))


def test_model_data_and_augmentation_can_be_handed_in(options: Train) -> None:
    data = load_data(options.data, "train"), load_data(options.data, "val")
    model = create_model("yolov7-tiny", 2, width=0.125)
    seen = []

    def augment(scene: Scene, rng: np.random.Generator) -> Scene:
        seen.append(rng.random())
        keep = np.zeros(len(scene.classes), np.bool_)
        keep[:1] = True
        return replace(scene.select(keep), image=np.full_like(scene.image, 7))

    bare = replace(options, data="", width=1.0, epochs=1)
    result = train(bare, model=model, data=data, augment=augment)
    assert len(seen) == len(set(seen)) == 8
    picture = cv2.imread(str(result.folder / "train_batch0.jpg"))
    assert picture is not None
    assert abs(int(np.median(picture)) - 7) < 3
    trained = load_model(result.folder / "weights" / "last.safetensors")
    assert trained.names == ["red", "blue"]
    state = load_state(result.folder)["model"]
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    resumed = train(
        Train(resume=str(result.folder), epochs=2, workers=0), data=data, augment=augment
    )
    assert resumed.epochs == 2
    assert len(seen) == 16


def test_what_is_handed_in_is_checked(options: Train) -> None:
    deploy = create_model("yolov7-tiny", 2, width=0.125, form="deploy")
    with pytest.raises(ValueError, match="takes a model in training form, this one's is deploy"):
        train(options, model=deploy)
    with pytest.raises(ValueError, match="neither weights nor variant"):
        train(replace(options, weights="x.pt"), model=create_model("yolov7-tiny", 2))

    def shrink(scene: Scene, _: np.random.Generator) -> Scene:
        return replace(scene, image=scene.image[::2])

    with pytest.raises(ValueError, match=r"augment made uint8 \(32, 64, 3\) of .*: keep the size"):
        train(options, augment=shrink)

    def lose(scene: Scene, _: np.random.Generator) -> Scene:
        return replace(scene, boxes=np.zeros((9, 4), np.float32))

    with pytest.raises(ValueError, match="augment gave 9 boxes, "):
        train(options, augment=lose)


@pytest.mark.parametrize("engine", ["eager", "graph"])
def test_evaluation_by_an_engine_of_ones_choice(
    engine: Any, options: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def watched(runtime: Runtime) -> AnyNetwork:
        asked.append(runtime.engine)
        return open_network(runtime)

    monkeypatch.setattr(validation, "open_network", watched)
    chosen = options if engine == "eager" else replace(options, val_engine=engine)
    train(replace(chosen, epochs=1))
    assert asked == [engine]
