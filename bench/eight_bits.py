"""Eight bits of random weights: ours, and what ONNX Runtime makes of an ONNX file."""

import copy
import logging
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from yolov7.engine.graph.calibrate import calibrate
from yolov7.model import YOLOv7


def calibrated(model: YOLOv7, x: Tensor) -> YOLOv7:
    """The model with ranges for int8, of one batch of images."""
    model.ranges["int8"] = calibrate(copy.deepcopy(model).fuse(), [x], torch.int8)
    return model


def quantised(path: Path, x: Tensor) -> Path:
    """The int8 file beside an ONNX file, by ONNX Runtime's static quantisation of one image."""
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]  # has no types
        def __init__(self) -> None:
            self.images = iter([{"images": x.numpy()}])

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.images, None)

    target = path.with_suffix(".int8.onnx")
    logging.getLogger().setLevel(logging.ERROR)  # it recommends what changes nothing here
    quantization.quantize_static(
        path,
        target,
        Reader(),
        per_channel=True,
        op_types_to_quantize=["Conv", "Concat", "MaxPool", "Resize", "LeakyRelu", "Sigmoid", "Mul"],
        extra_options={"ActivationSymmetric": False, "WeightSymmetric": True},
    )
    return target
