"""What the network computes in while it is trained."""

import torch

from yolov7.engine.choose import resolve_precision
from yolov7.kernels.runtime import FLOATS


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a `--precision`; "auto" is bf16 on CUDA and fp32 on a CPU."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return FLOATS[resolve_precision(precision, device)]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which the network computes in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
