"""What the network computes in while it is trained."""

import platform

import torch

from yolov7.engine.choose import resolve_precision
from yolov7.kernels.runtime import FLOATS

_X86 = platform.machine().lower() in ("x86_64", "amd64")


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """The dtype of a `--precision`.

    "auto" is fp32 on a CPU, bf16 on a GPU, fp16 (whose gradients are scaled) on one before compute
    capability 8.0, which has no bf16 arithmetic.
    """
    if precision != "auto":
        return FLOATS[resolve_precision(precision, device)]
    if device.type != "cuda":
        return torch.float32
    new = torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.bfloat16 if new else torch.float16


def slow_precision(dtype: torch.dtype, device: torch.device) -> str:
    """A warning, where the device has no instructions for a dtype; else empty."""
    # Private, as there is no public way to ask: where they are gone, nothing is said.
    asked = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    fast = any(getattr(torch.cpu, name, lambda: True)() for name in asked)
    if (device.type, dtype) != ("cpu", torch.bfloat16) or not _X86 or fast:
        return ""
    return "warning: this processor has no bf16 instructions: --precision fp32 is faster"


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which the network computes in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
