"""From detections and labels to COCO's figures."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bench.comparison import Comparison
from bench.data import CLASSES, random_sample
from yolov7.benchmark.clock import Work
from yolov7.dataset import Dataset

Detections = list[np.ndarray[Any, np.dtype[np.float32]]]


def scene(images: int) -> tuple[Dataset, Detections]:
    """Labels, and detections made by moving them, with as many again elsewhere."""
    random = np.random.default_rng(0)
    samples, detections = [], []
    for index in range(images):
        count = int(random.integers(1, 16))
        sample = random_sample(Path(f"{index}.jpg"), index + 1, 640, count, random)
        samples.append(sample)
        near = sample.labels.boxes + random.normal(0, 4, (count, 4))
        scores = random.uniform(0.01, 1, (2 * count, 1))
        boxes = np.concatenate([near, random.permutation(near) + 40])
        classes = np.concatenate([sample.labels.classes, random.integers(0, CLASSES, count)])
        found = np.concatenate([boxes, scores, classes[:, None]], 1)
        detections.append(found.astype(np.float32))
    names = [f"class{i}" for i in range(CLASSES)]
    return Dataset(samples, names, list(range(1, CLASSES + 1))), detections


def by_hand(dataset: Dataset, detections: Detections) -> Callable[[], float]:
    """AP by pycocotools, called directly."""
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    def corners_to_json(boxes: np.ndarray[Any, Any]) -> list[list[float]]:
        return np.concatenate([boxes[:, :2], boxes[:, 2:4] - boxes[:, :2]], 1).tolist()

    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for sample, found in zip(dataset.samples, detections, strict=True):
        labels = sample.labels
        for box, label in zip(corners_to_json(labels.boxes), labels.classes, strict=True):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": sample.image_id,
                    "category_id": dataset.category_ids[label],
                    "bbox": box,
                    "area": box[2] * box[3],
                    "iscrowd": 0,
                }
            )
        for box, (score, label) in zip(corners_to_json(found), found[:, 4:].tolist(), strict=True):
            results.append(
                {
                    "image_id": sample.image_id,
                    "category_id": dataset.category_ids[int(label)],
                    "bbox": box,
                    "score": score,
                }
            )

    def run() -> float:
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO()
            truth.dataset = {
                "images": [{"id": sample.image_id} for sample in dataset.samples],
                "annotations": annotations,
                "categories": [{"id": i} for i in dataset.category_ids],
            }
            truth.createIndex()
            evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        return float(evaluation.stats[0])

    return run


def agree(ap: float, stats: dict[str, float]) -> None:
    """The same AP."""
    assert abs(ap - stats["AP"]) < 1e-6, f"{ap} is not {stats['AP']}"


@pytest.mark.parametrize("images", [300], ids="{} images, 80 classes".format)
def bench_evaluate(images: int, compete: Comparison, smoke: bool) -> None:
    """Ours, with curves, confusion matrix and per-class figures, beside the bare twelve figures."""
    pytest.importorskip("pycocotools")
    from yolov7.evaluate.metric import measure

    dataset, detections = scene(5 if smoke else images)
    contenders = {
        "ours": lambda: measure(dataset, detections, {}).stats,
        "pycocotools": by_hand(dataset, detections),
    }
    compete(contenders, agree=agree, work=Work(items=len(detections)))
