import contextlib
import io
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from tests.yolov7.data_sets import found, sample
from yolov7.dataset import Dataset, load_data
from yolov7.evaluate import coco, coco_results, measure

pytestmark = pytest.mark.usefixtures("cache_folder")

BY_HAND = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR100")


@pytest.fixture(autouse=True, params=["pycocotools", "faster_coco_eval"])
def _evaluator(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(request.param, reason="faster-coco-eval, the extra fast-eval, is missing")
    monkeypatch.setattr(coco, "FAST", request.param == "faster_coco_eval")


def test_both_evaluators_find_the_same(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = load_data(data_dir / "coco-tiny", "val")
    detections = shaken(dataset)
    ours = coco.match(dataset, detections)
    monkeypatch.setattr(coco, "FAST", False)
    reference = coco.match(dataset, detections)
    np.testing.assert_allclose(ours.precision, reference.precision, rtol=0, atol=1e-6)
    np.testing.assert_allclose(ours.recall, reference.recall, rtol=0, atol=1e-6)
    assert ours.stats() == pytest.approx(reference.stats(), abs=1e-6)
    for a, b in zip(ours.classes, reference.classes, strict=True):
        assert a.boxes == b.boxes
        assert sorted(zip(a.scores, a.hits, strict=True)) == sorted(
            zip(b.scores, b.hits, strict=True)
        )


def shaken(dataset: Dataset, seed: int = 0) -> list[np.ndarray]:
    """Detections made of the labels: some lost, moved, of another class; others of nothing."""
    rng = np.random.default_rng(seed)
    detections = []
    for one in dataset.samples:
        boxes = one.labels.boxes[rng.random(len(one.labels.boxes)) < 0.85].astype(np.float64)
        classes = one.labels.classes[: len(boxes)].copy()
        sides = np.tile(boxes[:, 2:] - boxes[:, :2], 2)
        boxes += rng.normal(0, 0.06, boxes.shape) * sides
        confused = rng.random(len(classes)) < 0.1
        classes[confused] = rng.integers(0, len(dataset.names), confused.sum())
        corner = rng.random((3, 2)) * (one.width - 40, one.height - 40)
        boxes = np.concatenate([boxes, np.concatenate([corner, corner + 40], 1)])
        classes = np.concatenate([classes, rng.integers(0, len(dataset.names), 3)])
        scores = rng.random(len(boxes)).round(2)  # coarse: equal scores occur
        rows = np.concatenate([boxes, scores[:, None], classes[:, None]], 1)
        detections.append(rows[np.argsort(-scores, kind="stable")].astype(np.float32))
    return detections


def by_hand(annotations: Path, results: list[dict[str, Any]]) -> dict[str, float]:
    """The figures of pycocotools as its manual tells how to get them."""
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(annotations))
        evaluator = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return dict(zip(BY_HAND, evaluator.stats[:9].tolist(), strict=True))


@pytest.mark.parametrize("split", ["train", "val"])
def test_real_coco_annotations_give_the_figures_of_pycocotools(data_dir: Path, split: str) -> None:
    folder = data_dir / "coco-tiny"
    dataset = load_data(folder, split)
    assert any(one.labels.crowd.any() for one in dataset.samples)
    detections = shaken(dataset)
    stats = measure(dataset, detections).stats
    results = coco_results(dataset.samples, detections, dataset.category_ids)
    expected = by_hand(folder / f"annotations/instances_{split}2017.json", results)
    assert {name: stats[name] for name in BY_HAND} == pytest.approx(expected, abs=1e-6)
    assert 0.1 < stats["AP"] < 0.9


def test_made_annotations_give_the_figures_of_pycocotools(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    content: dict[str, list[dict[str, Any]]] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": number, "name": f"c{number}"} for number in (90, 1, 13)],
    }
    for image in range(12):
        name = f"{image}.png"
        cv2.imwrite(str(tmp_path / name), np.zeros((480, 640, 3), np.uint8))
        content["images"].append(
            {"id": 100 - image, "file_name": name, "height": 480, "width": 640}
        )
        for _ in range(rng.integers(0, 9)):
            x, y, w, h = (rng.random(4) * (500, 340, 140, 140)).round(2).tolist()
            content["annotations"].append(
                {"id": len(content["annotations"]) + 1, "image_id": 100 - image,
                 "category_id": int(rng.choice([1, 13, 90])), "bbox": [x, y, w, h],
                 "area": w * h * 0.4, "iscrowd": int(rng.random() < 0.2)}
            )  # fmt: skip
    path = tmp_path / "made.json"
    path.write_text(json.dumps(content))
    dataset = load_data(path, "val")
    detections = shaken(dataset)
    stats = measure(dataset, detections).stats
    expected = by_hand(path, coco_results(dataset.samples, detections, dataset.category_ids))
    assert {name: stats[name] for name in BY_HAND} == pytest.approx(expected, abs=1e-6)
    assert 0.1 < stats["AP"] < 0.9


def test_perfect_detections_score_one() -> None:
    dataset = Dataset(
        [
            sample([[0, 0, 20, 20], [100, 100, 200, 160]], [0, 1], image_id=5),
            sample([[0, 0, 300, 300]], [1], image_id=0),
        ],
        ["a", "b"],
        [0, 1],
    )
    detections = [
        found([0, 0, 20, 20, 0.9, 0], [100, 100, 200, 160, 0.8, 1]),
        found([0, 0, 300, 300, 0.7, 1]),
    ]
    evaluation = measure(dataset, detections, {"network": 2.0})
    names = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100", "precision", "recall")
    assert [evaluation.stats[name] for name in names] == pytest.approx([1] * 9)
    assert evaluation.confusion.tolist() == [[1, 0, 0], [0, 2, 0], [0, 0, 0]]
    assert [(row.name, row.images, row.instances) for row in evaluation.per_class] == [
        ("a", 1, 1),
        ("b", 2, 2),
    ]
    assert [row.ap for row in evaluation.per_class] == pytest.approx([1, 1])
    result = json.loads(json.dumps(evaluation.to_dict()))
    assert set(result) == {*evaluation.stats, "confidence", "per_class", "speed"}
    assert result["speed"] == {"network": 2.0}
    assert set(result["per_class"][0]) == {
        "name", "images", "instances", "precision", "recall", "AP50", "AP"
    }  # fmt: skip


def test_nothing_found_scores_zero() -> None:
    dataset = Dataset([sample([[0, 0, 20, 20]], [0])], ["a"], [0])
    evaluation = measure(dataset, [found()])
    assert [evaluation.stats[n] for n in ("AP", "AR100", "precision", "recall")] == [0, 0, 0, 0]
    assert evaluation.confusion.tolist() == [[0, 0], [1, 0]]


def test_nothing_to_find_scores_minus_one() -> None:
    dataset = Dataset([sample([], [])], ["a"], [0])
    evaluation = measure(dataset, [found([0, 0, 20, 20, 0.9, 0])])
    assert set(evaluation.stats.values()) == {-1.0}
    row = evaluation.per_class[0]
    assert (row.instances, row.precision, row.recall, row.ap50, row.ap) == (0, -1, -1, -1, -1)
    assert evaluation.confusion.tolist() == [[0, 1], [0, 0]]


def test_a_class_without_boxes_does_not_count_in_means() -> None:
    dataset = Dataset([sample([[0, 0, 20, 20]], [1])], ["a", "b"], [0, 1])
    evaluation = measure(dataset, [found([0, 0, 20, 20, 0.9, 1], [50, 50, 90, 90, 0.95, 0])])
    assert evaluation.stats["AP"] == pytest.approx(1)
    assert evaluation.stats["precision"] == 1
    assert evaluation.curves.names == ["b"]
    assert [row.ap for row in evaluation.per_class] == pytest.approx([-1, 1])


def test_precision_and_recall_are_those_of_the_best_f1() -> None:
    boxes = [[100.0 * i, 0, 100 * i + 50, 50] for i in range(4)]
    dataset = Dataset([sample(boxes, [0] * 4)], ["a"], [0])
    nowhere = [0, 300, 50, 350]
    rows = [[*boxes[0], 0.9, 0], [*boxes[1], 0.8, 0], [*nowhere, 0.7, 0], [*boxes[2], 0.6, 0]]
    rows += [[*nowhere, 0.5 - 0.01 * i, 0] for i in range(9)]
    evaluation = measure(dataset, [found(*rows)])
    # after 4 detections: 3 of them right, 3 of 4 boxes; every other cut has a lower F1
    assert evaluation.stats["precision"] == pytest.approx(3 / 4)
    assert evaluation.stats["recall"] == pytest.approx(3 / 4)
    assert 0.5 < evaluation.confidence <= 0.6
    curves = evaluation.curves
    at = np.searchsorted(curves.confidences, 0.75)
    assert (curves.precision[0, at], curves.recall[0, at]) == (1, 0.5)
    assert curves.precision[0, -1] == 1  # nothing is that confident: as the most confident one
    assert curves.recall[0, -1] == 0
    assert curves.precision[0, 0] == pytest.approx(3 / 13)


@pytest.mark.parametrize("parts", [1, 3, 100])
def test_classes_may_be_matched_apart(data_dir: Path, parts: int) -> None:
    dataset = load_data(data_dir / "coco-tiny", "val")
    detections = shaken(dataset)
    classes = coco.shares(detections, len(dataset.names), parts)
    assert len(classes) == min(parts, len(dataset.names))
    apart = [coco.match(dataset, detections, some) for some in classes]
    joined, whole = coco.Matching.joined(apart, classes), coco.match(dataset, detections)
    assert joined.stats() == whole.stats()
    np.testing.assert_array_equal(joined.precision, whole.precision)
    np.testing.assert_array_equal(joined.recall, whole.recall)
    for a, b in zip(joined.classes, whole.classes, strict=True):
        np.testing.assert_array_equal(a.scores, b.scores)
        np.testing.assert_array_equal(a.hits, b.hits)
        assert a.boxes == b.boxes


def test_crowds_are_neither_found_nor_missed() -> None:
    dataset = Dataset(
        [sample([[0, 0, 300, 300], [400, 0, 450, 50]], [0, 0], crowd=[True, False])], ["a"], [0]
    )
    inside = [[40.0 * i, 40, 40 * i + 30, 80, 0.9 - 0.1 * i, 0] for i in range(4)]
    evaluation = measure(dataset, [found(*inside, [400, 0, 450, 50, 0.4, 0])])
    assert evaluation.stats["AP"] == pytest.approx(1)
    assert evaluation.stats["precision"] == 1
    assert evaluation.per_class[0].instances == 1
    assert evaluation.confusion.tolist() == [[1, 0], [0, 0]]


def test_confusion_matrix_pairs_each_box_once_and_the_best_first() -> None:
    truth = sample([[0, 0, 100, 100], [0, 300, 100, 400], [300, 300, 340, 340]], [0, 1, 1])
    detections = found(
        [0, 0, 100, 80, 0.99, 0],  # IoU 0.8 with the first box, which a better one takes
        [0, 0, 100, 95, 0.5, 1],  # the better one, of the wrong class
        [0, 300, 100, 390, 0.9, 1],  # right
        [0, 310, 100, 400, 0.26, 1],  # a duplicate: background
        [300, 300, 340, 340, 0.24, 1],  # not confident enough: the third box is missed
    )
    matrix = measure(Dataset([truth], ["a", "b"], [0, 1]), [detections]).confusion
    assert matrix.tolist() == [[0, 0, 1], [1, 1, 1], [0, 1, 0]]


def test_confusion_matrix_gives_a_detection_its_second_box_where_the_first_is_taken() -> None:
    truth = sample([[0, 0, 100, 100], [0, 10, 100, 110]], [0, 0])
    detections = found([0, 0, 100, 100, 0.9, 0], [0, 4, 100, 104, 0.8, 0])
    matrix = measure(Dataset([truth], ["a"], [0]), [detections]).confusion
    assert matrix.tolist() == [[2, 0], [0, 0]]


def test_one_array_of_detections_for_every_image() -> None:
    with pytest.raises(ValueError, match="0 arrays of detections for 1 images"):
        measure(Dataset([sample([], [])], ["a"], [0]), [])


def test_results_in_cocos_form_use_its_ids() -> None:
    one = sample([], [], image_id=42)
    (result,) = coco_results([one], [found([10, 20, 40, 80, 0.5, 1])], [7, 90])
    assert result == {
        "image_id": 42, "category_id": 90, "bbox": [10, 20, 30, 60], "score": 0.5
    }  # fmt: skip
