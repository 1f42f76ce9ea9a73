"""Labelled data sets, in YOLO form or in COCO form, recognised by themselves.

    dataset = load_data("data.yaml", "val")

A data set is named by a `data.yaml`, a folder that holds one, a COCO json, a folder of COCO
jsons, or by `coco`, whose files are expected in `$YOLOV7_DATASETS/coco` (`datasets/coco` without
that variable).
"""

from yolov7.dataset.reader import load_data
from yolov7.dataset.sample import Dataset, Labels, Polygon, Sample

__all__ = ["Dataset", "Labels", "Polygon", "Sample", "load_data"]
