"""The one evaluator, for the command `val` and for training: pycocotools on any data set.

    network = open_network(Runtime(weights="yolov7.pt"))
    evaluation = evaluate(network, load_data("data.yaml", "val"), Settings(imgsz=640))
    evaluation.stats["AP"]

Its two halves serve alone as well: `predict` runs a network over the images of a data set,
`measure` compares detections with the labels.
"""

from yolov7.evaluate.coco import coco_results
from yolov7.evaluate.metric import ClassScore, Curves, Evaluation, measure
from yolov7.evaluate.run import Predictions, Settings, evaluate, predict

__all__ = [
    "ClassScore",
    "Curves",
    "Evaluation",
    "Predictions",
    "Settings",
    "coco_results",
    "evaluate",
    "measure",
    "predict",
]
