"""Labelled data sets, in YOLO form or in COCO form, recognised by themselves.

    dataset = load_data("data.yaml", "val")

A data set is named by a `data.yaml`, a folder that holds one, a COCO json, a folder of COCO
jsons (Roboflow's `train`, `valid`, `test` too), or by `coco`, whose files are expected in
`$YOLOV7_DATASETS/coco` (`datasets/coco` without that variable).
"""

from yolov7.dataset.reader import load_data
from yolov7.dataset.sample import Dataset, Labels, Polygon, Problem, Sample
from yolov7.dataset.split import load_splits

__all__ = ["Dataset", "Labels", "Polygon", "Problem", "Sample", "load_data", "load_splits"]
