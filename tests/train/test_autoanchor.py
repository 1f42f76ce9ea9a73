from pathlib import Path

import numpy as np

from yolov7.dataset import Sample
from yolov7.train.autoanchor import Sizes, better_anchors, box_sizes, fit_anchors, possible_recall

ANCHORS = np.array([[[10, 13], [16, 30]], [[62, 45], [116, 90]]], np.float32)


def samples(sizes: Sizes, height: int = 640, width: int = 320) -> list[Sample]:
    return [
        Sample(
            path=Path("a.jpg"),
            height=height,
            width=width,
            image_id=0,
            classes=np.zeros(len(sizes), np.int64),
            boxes=np.concatenate([np.zeros_like(sizes), sizes], 1).astype(np.float32),
            polygons=tuple([] for _ in sizes),
            crowd=np.zeros(len(sizes), np.bool_),
            areas=np.zeros(len(sizes)),
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
    recall, better = better_anchors(samples(boxes), ANCHORS, 640)
    assert recall > 0.98
    assert better is None


def test_bad_anchors_are_replaced() -> None:
    generator = np.random.default_rng(0)
    long = generator.normal([300, 20], [20, 2], (100, 2))
    small = generator.normal([6, 6], 0.5, (100, 2))
    boxes = np.concatenate([long, small])
    recall, better = better_anchors(samples(boxes), ANCHORS, 640)
    assert recall < 0.6
    assert better is not None
    assert better.shape == ANCHORS.shape
    assert possible_recall(boxes, better.reshape(-1, 2).astype(np.float64)) == 1
    assert (np.diff(better.reshape(-1, 2).prod(1)) >= 0).all()
    again = fit_anchors(box_sizes(samples(boxes), 640), 4)
    assert np.array_equal(again.astype(np.float32), better.reshape(-1, 2))


def test_too_few_boxes_say_nothing() -> None:
    assert better_anchors(samples(np.array([[300.0, 3]])), ANCHORS, 640) == (1.0, None)
