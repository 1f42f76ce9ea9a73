from pathlib import Path
from typing import Any

import numpy as np
import pytest

from yolov7.dataset import Dataset, Labels, Sample
from yolov7.model import create_model
from yolov7.train import autoanchor
from yolov7.train.autoanchor import (
    Sizes,
    better_anchors,
    box_sizes,
    fit_anchors,
    fit_model_anchors,
    possible_recall,
)
from yolov7.train.distributed import Ranks

ANCHORS = np.array([[[10, 13], [16, 30]], [[62, 45], [116, 90]]], np.float32)


def samples(sizes: Sizes, height: int = 640, width: int = 320) -> list[Sample]:
    return [
        Sample(
            path=Path("a.jpg"),
            height=height,
            width=width,
            image_id=0,
            labels=Labels(
                classes=np.zeros(len(sizes), np.int64),
                boxes=np.concatenate([np.zeros_like(sizes), sizes], 1).astype(np.float32),
                polygons=tuple([] for _ in sizes),
                crowd=np.zeros(len(sizes), np.bool_),
                areas=np.zeros(len(sizes)),
            ),
        )
    ]


def test_sizes_are_those_of_the_training_image() -> None:
    sizes = np.array([[10.0, 40], [1, 300], [100, 50]])
    assert box_sizes(samples(sizes), 320).tolist() == [[5, 20], [50, 25]]
    assert box_sizes([], 320).shape == (0, 2)


def test_possible_recall_is_the_assigners_rule() -> None:
    boxes = np.array([[39.0, 13], [41, 13], [10, 51], [10, 53], [2.6, 13], [2.4, 13]])
    assert possible_recall(boxes, np.array([[10.0, 13]])) == 3 / 6


def test_good_anchors_are_kept() -> None:
    boxes = np.random.default_rng(0).uniform(12, 100, (200, 2))
    recall, better = better_anchors(boxes, ANCHORS)
    assert recall > 0.98
    assert better is None


def test_bad_anchors_are_replaced() -> None:
    generator = np.random.default_rng(0)
    long = generator.normal([300, 20], [20, 2], (100, 2))
    small = generator.normal([6, 6], 0.5, (100, 2))
    boxes = np.concatenate([long, small])
    recall, better = better_anchors(boxes, ANCHORS)
    assert recall < 0.6
    assert better is not None
    assert better.shape == ANCHORS.shape
    assert possible_recall(boxes, better.reshape(-1, 2).astype(np.float64)) == 1
    assert (np.diff(better.reshape(-1, 2).prod(1)) >= 0).all()
    again = fit_anchors(boxes, 4)
    assert np.array_equal(again.astype(np.float32), better.reshape(-1, 2))


def test_too_few_boxes_to_fit_are_still_judged() -> None:
    assert better_anchors(np.array([[300.0, 3], [10, 13]]), ANCHORS) == (0.5, None)


def test_anchors_are_fitted_to_a_sample_of_many_boxes(monkeypatch: pytest.MonkeyPatch) -> None:
    boxes = np.random.default_rng(0).uniform(4, 400, (50_000, 2))
    counts = []

    def fitness(boxes: Sizes, anchors: Sizes) -> float:
        counts.append(len(boxes))
        return 0.0

    monkeypatch.setattr(autoanchor, "_fitness", fitness)
    monkeypatch.setattr(autoanchor, "GENERATIONS", 3)
    first, again, other = (fit_anchors(boxes, 4, seed) for seed in (0, 0, 1))
    assert set(counts) == {20_000}
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_new_anchors_are_fitted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are not good enough either."""
    boxes = np.array([[300.0, 5], [5, 300]] * 20)
    calls = []

    def fit(boxes: Sizes, count: int, seed: int) -> Sizes:
        calls.append(count)
        return boxes[:1].repeat(count, 0)

    monkeypatch.setattr(autoanchor, "fit_anchors", fit)
    model = create_model("yolov7-tiny", 1, width=0.125)
    note = fit_model_anchors(model, Dataset(samples(boxes), ["a"], [0]), 640, 0, Ranks())
    assert note.endswith("new anchors were fitted, which 50.0% match")
    assert calls == [9]


@pytest.mark.parametrize(
    ("sizes", "note"),
    [
        ([[300.0, 3]], "0.0% of the boxes match an anchor"),
        ([[1.0, 1]], "no box has 2 pixels a side: the anchors stay"),
        ([[20.0, 30]] * 20, "100.0% of the boxes match an anchor"),
        (
            [[300.0, 5], [320, 6]] * 20,
            "0.0% of the boxes match an anchor: new anchors were fitted, which 100.0% match",
        ),
    ],
    ids=["few", "tiny", "good", "bad"],
)
def test_what_is_said_about_the_anchors(sizes: list[list[float]], note: str) -> None:
    dataset = Dataset(samples(np.array(sizes)), ["a"], [0])
    model = create_model("yolov7-tiny", 1, width=0.125)
    before = model.head.anchors.clone()
    assert fit_model_anchors(model, dataset, 640, 0, Ranks()) == note
    assert model.head.anchors.equal(before) == ("new anchors" not in note)


def test_the_main_rank_searches_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = Dataset(samples(np.array([[300.0, 5], [320, 6]] * 20)), ["a"], [0])
    models = [create_model("yolov7-tiny", 1, width=0.125) for _ in range(2)]
    sent: list[Any] = []

    def share(value: Any, ranks: Ranks) -> Any:
        sent.append(value)
        return sent[0]

    monkeypatch.setattr(autoanchor, "share", share)
    searched = []

    def watched(*given: Any) -> Sizes:
        searched.append(given)
        return box_sizes(*given)

    monkeypatch.setattr(autoanchor, "box_sizes", watched)
    notes = {fit_model_anchors(m, dataset, 640, 0, Ranks(i, 2)) for i, m in enumerate(models)}
    assert len(searched) == len(notes) == 1
    assert models[0].head.anchors.equal(models[1].head.anchors)
