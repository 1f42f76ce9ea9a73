"""What a variant's plan launches, described without weights or memory."""

from typing import Any

import torch

from yolov7.engine.graph.planned import described
from yolov7.kernels.runtime import PRECISIONS
from yolov7.model import create_model


def workload(variant: str | None, batch: int, precision: str) -> dict[str, Any]:
    """What ``compile_cases`` of any kernel may ask for by name; see `yolov7.kernels.aot`.

    Args:
        variant: a model's name, whose plan says what is launched; None for samples.
        batch: images.
        precision: fp16, bf16, fp8 or fp32.
    """
    known: dict[str, Any] = {"batch": batch, "precision": precision}
    if variant is None:
        return known
    with torch.device("meta"):
        model = create_model(variant, form="deploy").fuse()
    size = model.imgsz
    strides = model.head.strides
    return {
        **known,
        "launches": described(model, batch, size, size, PRECISIONS[precision]),
        "size": size,
        "rows": 3 * sum((size // int(stride)) ** 2 for stride in strides),
        "nc": 80,
    }
