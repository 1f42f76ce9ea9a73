"""Made-up labelled images."""

from pathlib import Path

import numpy as np

from yolov7.dataset import Labels, Sample

CLASSES = 80


def random_sample(
    path: Path, index: int, side: int, boxes: int, random: np.random.Generator
) -> Sample:
    """An image of so many boxes, none of which leaves a square of `side` pixels."""
    corner = random.uniform(0, 0.75 * side, (boxes, 2))
    corners = np.concatenate([corner, corner + random.uniform(8, 0.25 * side, (boxes, 2))], 1)
    return Sample(
        path=path,
        height=side,
        width=side,
        labels=Labels(
            classes=random.integers(0, CLASSES, boxes),
            boxes=corners.astype(np.float32),
            polygons=tuple([] for _ in range(boxes)),
            crowd=np.zeros(boxes, np.bool_),
            areas=(corners[:, 2:] - corners[:, :2]).prod(1),
        ),
        image_id=index,
    )
