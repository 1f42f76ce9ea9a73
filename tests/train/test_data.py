from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from tests.train.test_augment import NOTHING
from yolov7.dataset import Dataset, Labels, Sample
from yolov7.train.config import PRESETS
from yolov7.train.data import TrainingData, part_of, stretch
from yolov7.train.images import CacheKind, ImageStore
from yolov7.train.loader import Batch, Loader
from yolov7.train.sampler import EpochSampler, Key, rectangles

SHAPES = [(48, 64), (64, 48), (200, 300), (64, 64), (30, 90), (64, 80), (72, 64)]


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    generator = np.random.default_rng(0)
    samples = []
    for i, (height, width) in enumerate(SHAPES):
        path = tmp_path / f"{i}.{'png' if i % 2 else 'jpg'}"
        low = generator.integers(0, 256, (6, 6, 3), np.uint8)
        cv2.imwrite(str(path), cv2.resize(low, (width, height)))
        count = i % 4
        corner = generator.uniform(0, 20, (count, 2))
        samples.append(
            Sample(
                path=path,
                height=height,
                width=width,
                image_id=i,
                labels=Labels(
                    classes=np.arange(count),
                    boxes=np.concatenate([corner, corner + 20], 1).astype(np.float32),
                    polygons=tuple([] for _ in range(count)),
                    crowd=np.zeros(count, np.bool_),
                    areas=np.full(count, 400.0),
                ),
            )
        )
    return Dataset(samples, ["a", "b", "c"], [0, 1, 2])


def epoch(data: TrainingData, sampler: EpochSampler, workers: int = 0) -> list[Batch]:
    return list(Loader(data, sampler, workers=workers, pin=False))


def test_batches_do_not_depend_on_workers(dataset: Dataset) -> None:
    data = TrainingData(dataset, 64, PRESETS["p5"].augmentation, seed=3)
    sampler = EpochSampler(len(SHAPES), 4, 64, seed=3)
    seen = []
    for sampler.epoch in (0, 1):
        alone, shared = epoch(data, sampler), epoch(data, sampler, workers=2)
        assert len(alone) == 2
        for a, b in zip(alone, shared, strict=True):
            assert a.images.shape == (4, 3, 64, 64)
            assert a.images.dtype == torch.uint8
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.labels, b.labels)
        seen.append(alone[0].images)
    assert not torch.equal(*seen)


def test_ranks_share_the_steps_of_one_process() -> None:
    whole = list(EpochSampler(13, 4, 64, seed=1))
    ranks = [list(EpochSampler(13, 2, 64, seed=1, rank=r, world=2)) for r in range(2)]
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole
    assert [len(batch) for batch in whole] == [4] * 4
    indices = [key.image for batch in whole for key in batch]
    assert sorted(indices[:13]) == list(range(13))
    assert indices[13:] == indices[:3]
    assert list(EpochSampler(13, 4, 64, seed=2)) != whole
    assert list(EpochSampler(13, 4, 64, seed=1, epoch=1)) != whole


def test_a_batch_larger_than_the_data_set_is_filled_up() -> None:
    (batch,) = EpochSampler(3, 8, 64)
    assert sorted(np.bincount([key.image for key in batch]).tolist()) == [2, 3, 3]


def test_image_weights_decide_how_often_an_image_is_drawn() -> None:
    weights = np.array([0.0, 1.0, 9.0])
    sampler = EpochSampler(3, 3, 64, weights=weights)
    drawn = []
    for sampler.epoch in range(200):
        drawn += [key.image for batch in sampler for key in batch]
    share = np.bincount(drawn, minlength=3) / len(drawn)
    assert share == pytest.approx([0, 0.1, 0.9], abs=0.05)


def test_image_weights_reach_every_image_of_a_mosaic_and_keep_rectangles() -> None:
    weights = np.array([0.0, 1.0, 9.0, 0.0])
    plain = EpochSampler(4, 4, 64)
    assert all(key.others == () for batch in plain for key in batch)
    shapes = [(64, 32), (64, 64), (32, 64), (64, 32)]
    sampler = EpochSampler(4, 2, 64, weights=weights, shapes=shapes)
    drawn: list[int] = []
    for sampler.epoch in range(50):
        for batch in sampler:
            assert batch[0].shape == batch[1].shape
            drawn += [other for key in batch for other in key.others]
        order = [
            key.image for batch in sorted(sampler, key=lambda b: b[0].position) for key in batch
        ]
        assert order == sorted(order, key=lambda i: shapes[i][0] / shapes[i][1])
    share = np.bincount(drawn, minlength=4) / len(drawn)
    assert share == pytest.approx([0, 0.1, 0.9, 0], abs=0.02)
    ranks = [EpochSampler(4, 1, 64, weights=weights, rank=r, world=2) for r in range(2)]
    whole = list(EpochSampler(4, 2, 64, weights=weights))
    assert [a + b for a, b in zip(*ranks, strict=True)] == whole


def test_the_last_epochs_have_no_mosaics(dataset: Dataset) -> None:
    data = TrainingData(dataset, 64, replace(NOTHING, mosaic=1.0))
    alone = TrainingData(dataset, 64, NOTHING)
    sampler = EpochSampler(len(SHAPES), 1, 64, mosaics=2)
    for sampler.epoch, same in ((0, False), (1, False), (2, True), (3, True)):
        for (key,) in sampler:
            assert torch.equal(data[key].image, alone[key].image) == same


def test_a_part_of_a_data_set_is_drawn_by_the_seed(dataset: Dataset) -> None:
    half, again, other = (part_of(dataset, 0.5, seed) for seed in (0, 0, 1))
    ids = [[sample.image_id for sample in part.samples] for part in (half, again, other)]
    assert ids[0] == ids[1] == sorted(ids[0])
    assert ids[0] != ids[2]
    assert len(ids[0]) == len(ids[2]) == round(len(SHAPES) / 2)
    assert len(part_of(dataset, 0.0, 0).samples) == 1
    assert part_of(dataset, 1.0, 0) is dataset


def test_rectangular_batches(dataset: Dataset) -> None:
    shapes = rectangles(dataset.samples, 64, 32)
    assert shapes == [(64, 64), (64, 64), (64, 64), (64, 64), (32, 64), (64, 64), (64, 64)]
    data = TrainingData(dataset, 64, NOTHING)
    batches = epoch(data, EpochSampler(len(SHAPES), 1, 64, shapes=shapes))
    assert sorted(tuple(b.images.shape[2:]) for b in batches) == sorted(shapes)


@pytest.mark.parametrize("cache", ["ram", "disk"])
def test_caches_change_nothing(
    dataset: Dataset, cache: CacheKind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path / "cache"))
    plain, cached = ImageStore(dataset.samples, 64), ImageStore(dataset.samples, 64, cache)
    for _ in range(2):
        for i, sample in enumerate(dataset.samples):
            a, b = plain(i), cached(i)
            assert max(a.shape) == 64
            assert a.shape == b.shape
            assert np.array_equal(a.image, b.image)
            scale = 64 / max(sample.height, sample.width)
            assert np.allclose(a.boxes, sample.labels.boxes * scale, 0.02)
    reads: list[Sample] = []
    monkeypatch.setattr(cached, "_read", reads.append)
    cached(0)
    assert not reads


def test_a_cache_that_cannot_be_written_is_done_without(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path / "file"))
    plain, cached = ImageStore(dataset.samples, 64), ImageStore(dataset.samples, 64, "disk")
    assert np.array_equal(plain(0).image, cached(0).image)


def test_disk_cache_follows_the_file(
    dataset: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path / "cache"))
    store = ImageStore(dataset.samples, 64, "disk")
    before = store(1).image
    cv2.imwrite(str(dataset.samples[1].path), np.full((64, 48, 3), 7, np.uint8))
    assert (store(1).image == 7).all()
    assert not (before == 7).all()
    for file in (tmp_path / "cache" / "images").iterdir():
        file.write_bytes(b"broken")
    assert (store(1).image == 7).all()


def test_items_are_rgb_with_relative_labels(dataset: Dataset) -> None:
    sample = dataset.samples[3]
    cv2.imwrite(str(sample.path), np.full((64, 64, 3), (10, 20, 30), np.uint8))
    data = TrainingData(replace(dataset, samples=[sample]), 128, NOTHING)
    image, labels, _ = data[Key(0, 0, 0, (128, 128))]
    assert image[:, 64, 64].tolist() == [30, 20, 10]
    centre = (sample.labels.boxes[:, :2] + sample.labels.boxes[:, 2:]) / 2 / 64
    assert np.allclose(labels[:, 1:3], centre, atol=1e-6)
    assert labels[:, 0].tolist() == [0, 1, 2]
    assert np.allclose(labels[:, 3:], 20 / 64)


def test_stretched_batches_have_sides_that_fit_the_stride() -> None:
    images = torch.rand(1, 3, 64, 96)
    shapes = {tuple(stretch(images, 32, np.random.default_rng(i)).shape[2:]) for i in range(30)}
    assert len(shapes) > 2
    assert all(h % 32 == w % 32 == 0 and 32 <= h <= 96 and 64 <= w <= 160 for h, w in shapes)
