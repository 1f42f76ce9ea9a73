"""From detections and labels to figures: COCO's twelve, curves and a confusion matrix.

Every figure but the confusion matrix comes from one matching, that of `yolov7.evaluate.coco`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from yolov7.dataset import Dataset
from yolov7.evaluate.coco import ALL_AREAS, AT_50, Detections, Matching, match
from yolov7.evaluate.confusion import confusion_matrix


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
    dataset: Dataset,
    detections: Sequence[Detections],
    speed: dict[str, float] | None = None,
    matching: Matching | None = None,
) -> Evaluation:
    """Compare detections with the labels of a data set.

    Args:
        dataset: The labelled images.
        detections: For every sample, in its order, [n, 6]: x1, y1, x2, y2 in pixels, score, class.
        speed: Passed on.
        matching: Of these detections, where it is made already.

    Raises:
        ValueError: Not one array of detections for every sample.
    """
    samples, names = dataset.samples, dataset.names
    if len(detections) != len(samples):
        raise ValueError(f"{len(detections)} arrays of detections for {len(samples)} images")
    matching = matching or match(dataset, detections)
    curves, shown = _curves(matching, names)
    best = int(curves.f1.mean(0).argmax()) if shown else 0
    stats = matching.stats()
    precision, recall = curves.precision[:, best], curves.recall[:, best]
    stats["precision"] = float(precision.mean()) if shown else -1.0
    stats["recall"] = float(recall.mean()) if shown else -1.0

    per_class = []
    for index, name in enumerate(names):
        found = [sample.labels.classes[~sample.labels.crowd] == index for sample in samples]
        row = shown.index(index) if index in shown else None
        by_iou = matching.precision[:, :, index, ALL_AREAS, -1]
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


def _curves(matching: Matching, names: list[str]) -> tuple[Curves, list[int]]:
    """The curves of all classes with boxes, and which classes these are."""
    confidences = np.arange(1001) / 1000  # as written, 0.351 and not 0.35100000000000003
    shown = [label for label, matches in enumerate(matching.classes) if matches.boxes]
    precisions, recalls = [], []
    for label in shown:
        scores, hits, boxes = matching.classes[label]
        said = len(scores) - np.searchsorted(np.sort(scores), confidences)
        right = hits.sum() - np.searchsorted(np.sort(scores[hits]), confidences)
        last = float(hits[scores.argmax()]) if len(scores) else 0.0
        precisions.append(np.where(said > 0, right / np.maximum(said, 1), last))
        recalls.append(right / boxes)
    grid = (len(shown), len(confidences))
    curves = Curves(
        names=[names[label] for label in shown],
        recalls=matching.recalls,
        precision_at_recall=matching.precision[AT_50, :, shown, ALL_AREAS, -1],
        confidences=confidences,
        precision=np.array(precisions).reshape(grid),
        recall=np.array(recalls).reshape(grid),
    )
    return curves, shown
