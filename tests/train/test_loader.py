"""What may go wrong with images, workers and shared memory while a run goes on."""

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.train.test_augment import NOTHING
from yolov7.dataset import Dataset, load_data
from yolov7.errors import UserError
from yolov7.train import loader as module
from yolov7.train.config import PRESETS
from yolov7.train.data import TrainingData
from yolov7.train.images import CacheKind
from yolov7.train.loader import Batch, Loader
from yolov7.train.loop import train
from yolov7.train.options import Train
from yolov7.train.report import Callback, read_rows
from yolov7.train.sampler import EpochSampler, Key
from yolov7.train.scene import Scene


@pytest.fixture
def dataset(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Dataset:
    """Eight images, which a test may damage."""
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path / "cache"))
    found = load_data(shapes, "train")
    samples = []
    for sample in found.samples:
        path = tmp_path / sample.path.name
        path.write_bytes(sample.path.read_bytes())
        samples.append(replace(sample, path=path))
    return replace(found, samples=samples)


def spoil(path: Path) -> None:
    """Header and end stay, what is between them goes."""
    data = bytearray(path.read_bytes())
    data[60:-40] = bytes(len(data) - 100)
    path.write_bytes(data)


def shrink(path: Path) -> None:
    cv2.imwrite(str(path), np.zeros((64, 20, 3), np.uint8))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "damaged": spoil,
    "gone": Path.unlink,
    "changed": shrink,
    "empty": lambda path: path.open("w").close(),
}


@pytest.mark.parametrize("cache", ["none", "ram", "disk"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_the_next_image_takes_the_place_of_one_that_cannot_be_read(
    damage: str, cache: CacheKind, dataset: Dataset
) -> None:
    for sample in dataset.samples[6:]:
        DAMAGES[damage](sample.path)
    data = TrainingData(dataset, 64, NOTHING, cache=cache)
    wanted = data[Key(0, 0, 0, (64, 64))]
    assert not wanted.notes
    for _ in range(2):
        found = data[Key(0, 0, 6, (64, 64))]
        assert torch.equal(found.image, wanted.image)
        assert torch.equal(found.labels, wanted.labels)
        assert len(found.notes) == 2
        assert found.notes[0].startswith("left out, another in its place: ")
        assert str(dataset.samples[6].path) in found.notes[0]


def test_a_set_of_which_nothing_can_be_read_is_one_line(dataset: Dataset) -> None:
    for sample in dataset.samples:
        sample.path.unlink()
    data = TrainingData(dataset, 64, NOTHING)
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"^none of 8 images can be read: \S+\.png: .*$"):
            next(iter(Loader(data, EpochSampler(8, 4, 64), workers=workers, pin=False)))


def test_a_cache_on_a_full_disk_is_done_without(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    data = TrainingData(dataset, 64, NOTHING, cache="disk")
    monkeypatch.setattr(np, "save", full)
    assert data[Key(0, 0, 0, (64, 64))].notes == ()


class Spoiler(Callback):
    """Damages images between two epochs."""

    def __init__(self, *paths: Path) -> None:
        self.paths = paths

    def on_epoch(self, row: dict[str, float], validation: Any) -> None:  # noqa: ARG002
        for path in self.paths:
            if path.exists():
                spoil(path)


@pytest.mark.parametrize("workers", [0, 1])
def test_images_that_break_during_a_run_are_listed_once(
    workers: int, options: Train, dataset: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    val = replace(dataset, samples=dataset.samples[4:])
    broken = dataset.samples[2].path, dataset.samples[5].path
    options = replace(options, epochs=3, workers=workers)
    result = train(options, [Spoiler(*broken)], data=(dataset, val))
    lines = capsys.readouterr().out.splitlines()
    for path in broken:
        note = f"left out, another in its place: {path}"
        assert sum(line.startswith(note) for line in lines) == 1
    told = [line for line in lines if line.startswith("left out of the evaluation: ")]
    assert len(told) == 1
    assert str(broken[1]) in told[0]
    assert [row["epoch"] for row in read_rows(result.folder / "results.csv")] == [1, 2, 3]


def test_batches_go_through_pipes_where_shared_memory_is_full(
    dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = TrainingData(dataset, 64, PRESETS["tiny"].augmentation)
    alone = list(Loader(data, EpochSampler(8, 4, 64), workers=0, pin=False))

    def full(_: Tensor) -> Tensor:
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    monkeypatch.setattr(Tensor, "share_memory_", full)  # as the forked workers see it
    piped = list(Loader(data, EpochSampler(8, 4, 64), workers=2, pin=False))
    for a, b in zip(alone, piped, strict=True):
        assert isinstance(b, Batch)
        assert torch.equal(a.images, b.images)
        assert torch.equal(a.labels, b.labels)
        assert (a.notes, b.notes) == ((), (module.FULL,))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_cannot_be_augmented_is_one_line_that_names_it(
    workers: int, dataset: Dataset
) -> None:
    data = TrainingData(dataset, 64, NOTHING)

    def fail(*_: Any, **__: Any) -> Scene:
        raise cv2.error("(-215:Assertion failed) !ssize.empty()")

    data.augmenter = fail  # type: ignore[assignment]  # a stand-in
    with pytest.raises(UserError, match=r"^\S+/00\d\.png: error .*!ssize.empty\(\)$"):
        next(iter(Loader(data, EpochSampler(8, 4, 64), workers=workers, pin=False)))


def stall(scene: Scene, _: np.random.Generator) -> Scene:
    time.sleep(100)
    return scene


def die(scene: Scene, _: np.random.Generator) -> Scene:
    os.kill(os.getpid(), signal.SIGKILL)
    return scene


@pytest.mark.parametrize(
    ("augment", "reason"),
    [(stall, "DataLoader timed out after 1 sec"), (die, "DataLoader worker ")],
)
def test_workers_that_stall_or_die_are_one_line(
    augment: Any, reason: str, dataset: Dataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "STALLED", 1)
    data = TrainingData(dataset, 64, NOTHING, augment=augment)
    with pytest.raises(UserError, match=f"^{reason}.*: see whether memory .*fewer --workers$"):
        next(iter(Loader(data, EpochSampler(8, 4, 64), workers=1, pin=False)))
