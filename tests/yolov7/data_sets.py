"""Small data sets for tests."""

import json
import sys
from itertools import chain
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from yolov7.dataset import Dataset, Labels, Sample

linux = pytest.mark.skipif(
    sys.platform != "linux", reason="needs pipes, links and names of any bytes, or counts KB"
)
WIDTH, HEIGHT = 80, 40
BOX = "0 0.5 0.5 0.25 0.5"  # 30 10 50 30 in pixels


def write_image(path: Path, height: int = HEIGHT, width: int = WIDTH) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0).integers(0, 255, (height, width, 3), dtype=np.uint8)
    assert cv2.imwrite(str(path), noise)
    return path


def write_label(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def yolo_data(root: Path, description: str = "names: [cell, dot]\nval: images/val\n") -> Path:
    """Three images: a box and a polygon, a background with a file, one without."""
    for name in ("a", "b", "c"):
        write_image(root / f"images/val/{name}.jpg")
    polygon = "1 0.1 0.1 0.5 0.1 0.5 0.9 0.1 0.9"
    write_label(root / "labels/val/a.txt", BOX, "", polygon)
    write_label(root / "labels/val/b.txt")
    path = root / "data.yaml"
    path.write_text(description)
    return path


def coco_content() -> dict[str, Any]:
    part = [10.0, 10.0, 30.0, 10.0, 30.0, 20.0, 10.0, 20.0]
    return {
        "images": [
            {"id": 7, "file_name": "7.jpg", "height": HEIGHT, "width": WIDTH},
            {"id": 3, "file_name": "3.jpg", "height": HEIGHT, "width": WIDTH},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 18, "bbox": [10, 10, 60, 10], "area": 250.0,
             "iscrowd": 0, "segmentation": [part, [x + 40 for x in part]]},
            {"id": 2, "image_id": 7, "category_id": 90, "bbox": [0, 0, 80, 40], "area": 900.0,
             "iscrowd": 1, "segmentation": {"counts": [1, 2], "size": [HEIGHT, WIDTH]}},
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 18, "name": "dog"}],
    }  # fmt: skip


def coco_data(root: Path, content: dict[str, Any] | None = None) -> Path:
    for name in ("7", "3"):
        write_image(root / f"val2017/{name}.jpg")
    path = root / "annotations/instances_val2017.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content or coco_content()))
    return path


def assert_same(a: Dataset, b: Dataset) -> None:
    assert (a.names, a.category_ids, a.skipped) == (b.names, b.category_ids, b.skipped)
    assert len(a.samples) == len(b.samples)
    for x, y in zip(a.samples, b.samples, strict=True):
        assert (x.path, x.height, x.width, x.image_id) == (y.path, y.height, y.width, y.image_id)
        for field in ("classes", "boxes", "crowd", "areas"):
            first, second = getattr(x.labels, field), getattr(y.labels, field)
            np.testing.assert_array_equal(first, second)
            assert first.dtype == second.dtype
        outlines = x.labels.polygons, y.labels.polygons
        assert [len(parts) for parts in outlines[0]] == [len(parts) for parts in outlines[1]]
        for first, second in zip(*(chain(*parts) for parts in outlines), strict=True):
            np.testing.assert_array_equal(first, second)


def sample(
    boxes: list[list[float]],
    classes: list[int],
    *,
    crowd: list[bool] | None = None,
    image_id: int = 1,
    path: Path = Path("x.png"),
    size: tuple[int, int] = (480, 640),
) -> Sample:
    array = np.array(boxes, np.float32).reshape(-1, 4)
    return Sample(
        path=path,
        height=size[0],
        width=size[1],
        image_id=image_id,
        labels=Labels(
            classes=np.array(classes, np.int64),
            boxes=array,
            polygons=tuple([] for _ in classes),
            crowd=np.array(crowd or [False] * len(classes), np.bool_),
            areas=np.prod(array[:, 2:] - array[:, :2], axis=1).astype(np.float64),
        ),
    )


def found(*rows: list[float]) -> np.ndarray:
    """Detections from rows of x1, y1, x2, y2, score, class."""
    return np.array(rows, np.float32).reshape(-1, 6)


def roboflow(root: Path, **splits: list[str]) -> Path:
    """A folder per split, its json among its images; a category above the others."""
    for split, names in splits.items():
        images = [{"id": i, "file_name": name, "height": HEIGHT, "width": WIDTH}
                  for i, name in enumerate(names)]  # fmt: skip
        annotations = [{"id": i, "image_id": i, "category_id": 1, "bbox": [i, 2, 9, 9]}
                       for i in range(len(names))]  # fmt: skip
        categories = [{"id": 0, "name": "cells", "supercategory": "none"},
                      {"id": 1, "name": "red", "supercategory": "cells"},
                      {"id": 2, "name": "white", "supercategory": "cells"}]  # fmt: skip
        for name in names:
            write_image(root / split / name)
        content = {"images": images, "annotations": annotations, "categories": categories}
        (root / split / "_annotations.coco.json").write_text(json.dumps(content))
    return root


def unsplit(root: Path) -> Path:
    """One json that names no split, and its images."""
    path = coco_data(root)
    (root / "val2017").rename(root / "images")
    return path.rename(path.with_name("latest.json"))
