"""COCO's matching of detections and boxes: by pycocotools, or in C++ where that is installed.

Per image and class the best 100 detections, highest score first, each take the free box that they
overlap most; crowds absorb detections without being found or missed. `faster-coco-eval` (the extra
`fast-eval`) does that to the last bit but one in a fraction of the time; pycocotools is what it is
compared with.
"""

import contextlib
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from yolov7.boxes import to_coco
from yolov7.dataset import Dataset, Sample

Detections = NDArray[np.float32]  # [n, 6] x1, y1, x2, y2 in pixels of the image, score, class

FAST = find_spec("faster_coco_eval") is not None
ALL_AREAS = 0  # of the four ranges of size: all, small, medium, large
AT_50, AT_75 = 0, 5  # of the ten thresholds of IoU


class Matches(NamedTuple):
    """Detections of a class at IoU 0.5, those that count neither way left out.

    Attributes:
        scores: [n].
        hits: [n] whether it has a box.
        boxes: How many there are to find.
    """

    scores: NDArray[np.float64]
    hits: NDArray[np.bool_]
    boxes: int


@dataclass(frozen=True, eq=False)
class Matching:
    """What COCO's evaluator found; -1 where there is nothing to find.

    Attributes:
        recalls: [101] where precision is taken.
        precision: [10, 101, nc, 4, 3] by IoU, recall, class, range of size, most detections.
        recall: [10, nc, 4, 3].
        classes: [nc] matches of each.
    """

    recalls: NDArray[np.float64]
    precision: NDArray[np.float64]
    recall: NDArray[np.float64]
    classes: list[Matches]

    def stats(self) -> dict[str, float]:
        """AP, AP50, AP75, APs, APm, APl, AR1, AR10, AR100 as pycocotools summarises them."""
        precision, recall = self.precision[..., -1], self.recall[:, :, ALL_AREAS]
        of = {"AP": precision[..., ALL_AREAS]}
        of |= {"AP50": of["AP"][AT_50], "AP75": of["AP"][AT_75]}
        of |= {f"AP{size}": precision[..., area] for area, size in enumerate("sml", 1)}
        of |= {f"AR{most}": recall[..., index] for index, most in enumerate((1, 10, 100))}
        return {name: _mean(values) for name, values in of.items()}

    @classmethod
    def joined(cls, parts: Sequence["Matching"], classes: Sequence[Sequence[int]]) -> "Matching":
        """One of all classes, of those of some classes each."""
        order = np.argsort(np.concatenate(classes))
        matches = [one for part in parts for one in part.classes]
        return cls(
            parts[0].recalls,
            np.concatenate([part.precision for part in parts], 2)[:, :, order],
            np.concatenate([part.recall for part in parts], 1)[:, order],
            [matches[place] for place in order],
        )


def shares(detections: Sequence[Detections], classes: int, parts: int) -> list[list[int]]:
    """The classes dealt out, those with the most detections first; no part is empty.

    Classes are matched independently of each other, so that others can have them meanwhile.
    """
    counts = np.zeros(classes, np.int64)
    for boxes in detections:
        counts += np.bincount(boxes[:, 5].astype(np.int64), minlength=classes)
    order = np.argsort(-counts, kind="stable").tolist()
    return [order[first::parts] for first in range(min(parts, classes))]


def match(
    dataset: Dataset, detections: Sequence[Detections], classes: Sequence[int] | None = None
) -> Matching:
    """Match detections with the labels of a data set.

    Args:
        dataset: The labelled images.
        detections: For every sample, in its order, [n, 6].
        classes: Which to look at, in the order of what is returned; none: all.
    """
    samples, every = dataset.samples, range(len(dataset.names))
    # The places of classes serve as categories, so that the arrays are indexed by them.
    place = {label: index for index, label in enumerate(every if classes is None else classes)}
    found = _chosen(coco_results(samples, detections, every), place)
    # ids start at 1: a match with id 0 is taken for none
    for number, annotation in enumerate(found, 1):
        width, height = annotation["bbox"][2:]
        annotation |= {"id": number, "area": width * height, "iscrowd": 0}
    evaluate = _by_faster_coco_eval if FAST else _by_pycocotools
    labelled = _chosen(_labelled(samples), place)
    return evaluate(
        _description(samples, len(place), labelled), _description(samples, len(place), found)
    )


def _chosen(rows: list[dict[str, Any]], place: dict[int, int]) -> list[dict[str, Any]]:
    """The annotations of some classes, which get their places as categories."""
    return [
        row | {"category_id": place[row["category_id"]]}
        for row in rows
        if row["category_id"] in place
    ]


def coco_results(
    samples: Sequence[Sample], detections: Sequence[Detections], category_ids: Sequence[int]
) -> list[dict[str, Any]]:
    """Detections of a data set in the form of COCO's result files; see `yolov7.boxes.to_coco`."""
    pairs = zip(samples, detections, strict=True)
    rows = (to_coco(torch.as_tensor(boxes), one.image_id, category_ids) for one, boxes in pairs)
    return list(chain.from_iterable(rows))


def _labelled(samples: Sequence[Sample]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for sample in samples:
        boxes = sample.labels.boxes.astype(np.float64)
        for row, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            rows.append(
                {
                    "id": len(rows) + 1,
                    "image_id": sample.image_id,
                    "category_id": int(sample.labels.classes[row]),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": float(sample.labels.areas[row]),
                    "iscrowd": int(sample.labels.crowd[row]),
                }
            )
    return rows


def _description(
    samples: Sequence[Sample], classes: int, annotations: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "images": [{"id": sample.image_id} for sample in samples],
        "categories": [{"id": label} for label in range(classes)],
        "annotations": annotations,
    }


def _by_pycocotools(truth: dict[str, Any], found: dict[str, Any]) -> Matching:
    def index(description: dict[str, Any]) -> COCO:
        made = COCO()
        made.dataset = description
        made.createIndex()
        return made

    def part(first: int, images: int) -> Iterator[tuple[Any, Any, Any, int]]:
        for entry in filter(None, evaluator.evalImgs[first : first + images]):
            hits, ignored = entry["dtMatches"][AT_50] > 0, entry["dtIgnore"][AT_50]
            yield entry["dtScores"], hits, ignored, int((entry["gtIgnore"] == 0).sum())

    with contextlib.redirect_stdout(io.StringIO()):  # it prints every step
        evaluator = COCOeval(index(truth), index(found), "bbox")
        evaluator.evaluate()
        evaluator.accumulate()
    return _matching(evaluator, part)


def _by_faster_coco_eval(truth: dict[str, Any], found: dict[str, Any]) -> Matching:
    from faster_coco_eval import COCO, COCOeval_faster

    def part(first: int, images: int) -> Iterator[tuple[Any, Any, Any, int]]:
        # One object an image; what it holds can be read as it is pickled, and in no other way.
        for entry in evaluator._evalImgs_cpp[first : first + images]:
            matches, _, scores, missable, ignored, *_ = entry.__getstate__()
            count = len(scores)  # the first of ten thresholds
            hits = np.asarray(matches[:count]) > 0
            yield scores, hits, ignored[:count], len(missable) - sum(missable)

    evaluator = COCOeval_faster(COCO(truth), COCO(found), "bbox", separate_eval=True)
    evaluator.evaluate()
    evaluator.accumulate()
    return _matching(evaluator, part)


def _matching(evaluator: Any, part: Any) -> Matching:
    """What an evaluator found; `part` gives scores, hits, ignored and boxes of some images."""
    images, areas = len(evaluator.params.imgIds), len(evaluator.params.areaRng)
    classes = []
    for label in range(len(evaluator.params.catIds)):
        rows = list(part((label * areas + ALL_AREAS) * images, images))
        columns = zip(*rows, strict=True) if rows else ((), (), (), ())
        scores, hits, ignored, boxes = columns
        counted = ~_joined(ignored, np.bool_)
        kept = _joined(scores, np.float64)[counted], _joined(hits, np.bool_)[counted]
        classes.append(Matches(*kept, sum(boxes)))
    found = evaluator.eval
    return Matching(
        np.asarray(evaluator.params.recThrs),
        np.asarray(found["precision"]),
        np.asarray(found["recall"]),
        classes,
    )


def _joined(parts: Sequence[Any], dtype: Any) -> NDArray[Any]:
    return np.concatenate([np.zeros(0, dtype), *(np.asarray(part, dtype) for part in parts)])


def _mean(values: NDArray[np.float64]) -> float:
    known = values[values > -1]
    return float(known.mean()) if len(known) else -1.0
