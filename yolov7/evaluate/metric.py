"""From detections and labels to figures: COCO's twelve, curves and a confusion matrix.

Every figure but the confusion matrix comes from one matching, that of pycocotools: per image and
class the best 100 detections, highest score first, each taking the free box that it overlaps most;
crowds absorb detections without being found or missed.
"""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from yolov7.boxes import to_coco
from yolov7.dataset import Dataset, Sample
from yolov7.evaluate.confusion import confusion_matrix

Detections = NDArray[np.float32]  # [n, 6] x1, y1, x2, y2 in pixels of the image, score, class

# the order in which pycocotools summarises, without AR by size
STATS = {
    "AP": 0, "AP50": 1, "AP75": 2, "APs": 3, "APm": 4, "APl": 5, "AR1": 6, "AR10": 7, "AR100": 8,
}  # fmt: skip
ALL_AREAS = 0  # of pycocotools' four ranges of size
AT_50 = 0  # of its ten thresholds of IoU


@dataclass(frozen=True)
class ClassScore:
    """One row of the per-class table; -1 where the class has no boxes in the data set.

    Attributes:
        name: The class.
        images: Images that show it.
        instances: Its boxes, crowds apart.
        precision: At `Evaluation.confidence` and IoU 0.5.
        recall: The same.
        ap50: Average precision at IoU 0.5.
        ap: Average precision, mean over IoU 0.5 to 0.95.
    """

    name: str
    images: int
    instances: int
    precision: float
    recall: float
    ap50: float
    ap: float


@dataclass(frozen=True, eq=False)
class Curves:
    """Curves at IoU 0.5 of the classes that have boxes in the data set.

    Attributes:
        names: [k] those classes.
        recalls: [101] recall, 0 to 1.
        precision_at_recall: [k, 101] the best precision at that recall or more.
        confidences: [1001] confidence, 0 to 1.
        precision: [k, 1001] precision of the detections with that confidence or more; where there
            are none, that of the most confident one, 0 for a class without any.
        recall: [k, 1001].
    """

    names: list[str]
    recalls: NDArray[np.float64]
    precision_at_recall: NDArray[np.float64]
    confidences: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]

    @property
    def f1(self) -> NDArray[np.float64]:
        """[k, 1001] harmonic mean of precision and recall."""
        total = np.maximum(self.precision + self.recall, 1e-12)
        return np.asarray(2 * self.precision * self.recall / total)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """What an evaluation found.

    Attributes:
        stats: AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100 as pycocotools gives them (-1 where
            there is nothing to find), precision and recall, means over classes at `confidence`.
        confidence: Where the mean F1 over classes at IoU 0.5 is best.
        per_class: One row for every class of the data set.
        confusion: [nc + 1, nc + 1] counts, predicted class by true class; the last row counts
            missed boxes, the last column detections of background.
        curves: Precision, recall and F1 by confidence, precision by recall.
        images: Number of images.
        speed: Milliseconds per image by stage; empty if only detections were compared.
    """

    stats: dict[str, float]
    confidence: float
    per_class: list[ClassScore]
    confusion: NDArray[np.int64]
    curves: Curves
    images: int
    speed: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """The result as `val --json` writes it."""
        rows = [
            {
                "name": row.name,
                "images": row.images,
                "instances": row.instances,
                "precision": row.precision,
                "recall": row.recall,
                "AP50": row.ap50,
                "AP": row.ap,
            }
            for row in self.per_class
        ]
        return {**self.stats, "confidence": self.confidence, "per_class": rows, "speed": self.speed}


def measure(
    dataset: Dataset, detections: Sequence[Detections], speed: dict[str, float] | None = None
) -> Evaluation:
    """Compare detections with the labels of a data set.

    Args:
        dataset: The labelled images.
        detections: For every sample, in its order, [n, 6]: x1, y1, x2, y2 in pixels, score, class.
        speed: Passed on.

    Raises:
        ValueError: Not one array of detections for every sample.
    """
    samples, names = dataset.samples, dataset.names
    if len(detections) != len(samples):
        raise ValueError(f"{len(detections)} arrays of detections for {len(samples)} images")
    evaluator = _run_pycocotools(dataset, detections)
    curves, shown = _curves(evaluator, names)
    best = int(curves.f1.mean(0).argmax()) if shown else 0
    stats = {name: float(evaluator.stats[index]) for name, index in STATS.items()}
    precision, recall = curves.precision[:, best], curves.recall[:, best]
    stats["precision"] = float(precision.mean()) if shown else -1.0
    stats["recall"] = float(recall.mean()) if shown else -1.0

    per_class = []
    for index, name in enumerate(names):
        found = [sample.labels.classes[~sample.labels.crowd] == index for sample in samples]
        row = shown.index(index) if index in shown else None
        by_iou = evaluator.eval["precision"][:, :, index, ALL_AREAS, -1]
        per_class.append(
            ClassScore(
                name=name,
                images=sum(bool(hits.any()) for hits in found),
                instances=sum(int(hits.sum()) for hits in found),
                precision=-1.0 if row is None else float(precision[row]),
                recall=-1.0 if row is None else float(recall[row]),
                ap50=float(by_iou[AT_50].mean()),
                ap=float(by_iou.mean()),
            )
        )
    return Evaluation(
        stats=stats,
        confidence=float(curves.confidences[best]),
        per_class=per_class,
        confusion=confusion_matrix(samples, detections, len(names)),
        curves=curves,
        images=len(samples),
        speed=speed or {},
    )


def coco_results(
    samples: Sequence[Sample], detections: Sequence[Detections], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections of a data set in the form of COCO's result files; see `yolov7.boxes.to_coco`."""
    pairs = zip(samples, detections, strict=True)
    rows = (to_coco(torch.as_tensor(boxes), one.image_id, category_ids) for one, boxes in pairs)
    return list(chain.from_iterable(rows))


def _run_pycocotools(dataset: Dataset, detections: Sequence[Detections]) -> COCOeval:
    """Evaluate with classes as categories, so that the arrays are indexed by class."""
    samples, classes = dataset.samples, range(len(dataset.names))
    # ids start at 1: pycocotools takes a match with id 0 for no match
    found = coco_results(samples, detections, classes)
    for number, annotation in enumerate(found, 1):
        width, height = annotation["bbox"][2:]
        annotation |= {"id": number, "area": width * height, "iscrowd": 0}
    labelled: list[dict[str, Any]] = []
    for sample in samples:
        boxes = sample.labels.boxes.astype(np.float64)
        for row, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            labelled.append(
                {
                    "id": len(labelled) + 1,
                    "image_id": sample.image_id,
                    "category_id": int(sample.labels.classes[row]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(sample.labels.areas[row]),
                    "iscrowd": int(sample.labels.crowd[row]),
                }
            )
    with contextlib.redirect_stdout(io.StringIO()):  # it prints every step
        evaluator = COCOeval(
            _index(samples, classes, labelled), _index(samples, classes, found), "bbox"
        )
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def _index(
    samples: Sequence[Sample], classes: Sequence[int], annotations: list[dict[str, Any]]
) -> COCO:
    index = COCO()
    index.dataset = {
        "images": [{"id": sample.image_id} for sample in samples],
        "categories": [{"id": label} for label in classes],
        "annotations": annotations,
    }
    index.createIndex()
    return index


def _curves(evaluator: COCOeval, names: list[str]) -> tuple[Curves, list[int]]:
    """The curves of all classes with boxes, and which classes these are."""
    images, areas = len(evaluator.params.imgIds), len(evaluator.params.areaRng)
    confidences = np.arange(1001) / 1000  # as written, 0.351 and not 0.35100000000000003
    shown, precisions, recalls = [], [], []
    for index in range(len(names)):
        first = (index * areas + ALL_AREAS) * images
        matched = [entry for entry in evaluator.evalImgs[first : first + images] if entry]
        boxes = sum(int((entry["gtIgnore"] == 0).sum()) for entry in matched)
        if not boxes:
            continue
        counted = [~entry["dtIgnore"][AT_50].astype(bool) for entry in matched]
        scores = np.concatenate(
            [np.asarray(e["dtScores"])[c] for e, c in zip(matched, counted, strict=True)]
        )
        hits = np.concatenate(
            [e["dtMatches"][AT_50][c] > 0 for e, c in zip(matched, counted, strict=True)]
        )
        all_scores = np.sort(scores)
        said = len(scores) - np.searchsorted(all_scores, confidences)
        right = hits.sum() - np.searchsorted(np.sort(scores[hits]), confidences)
        last = float(hits[scores.argmax()]) if len(scores) else 0.0
        shown.append(index)
        precisions.append(np.where(said > 0, right / np.maximum(said, 1), last))
        recalls.append(right / boxes)
    grid = (len(shown), len(confidences))
    curves = Curves(
        names=[names[index] for index in shown],
        recalls=np.asarray(evaluator.params.recThrs),
        precision_at_recall=evaluator.eval["precision"][AT_50, :, shown, ALL_AREAS, -1],
        confidences=confidences,
        precision=np.array(precisions).reshape(grid),
        recall=np.array(recalls).reshape(grid),
    )
    return curves, shown
