"""`yolov7 tune`: the fastest configs of the kernels on the GPU at hand."""

import signal
import sys
import time
from dataclasses import dataclass
from typing import Literal

import torch

from yolov7.engine.graph.workload import workload
from yolov7.errors import UserError, at_least_one
from yolov7.kernels.conv.config import user_configs
from yolov7.kernels.tune import expected_seconds, tune_device
from yolov7.variants import named


@dataclass(kw_only=True)
class Tune:
    """Find the fastest kernel configs on this GPU; a run that was cut goes on where it stopped."""

    variant: str = "yolov7"
    """model whose layers are tuned"""
    batch: tuple[int, ...] = (1, 32)
    """images at a time, of each plan that is tuned"""
    precision: Literal["fp32", "fp16", "bf16", "fp8", "int8"] = "fp16"
    """of feature maps and weights"""
    minutes: float = 20.0
    """stop after this long"""


def run(options: Tune) -> int:
    """Tune until done or out of time, a line for each launch."""
    named(options.variant)
    for batch in options.batch or (0,):
        at_least_one("batch", batch)
    if not torch.cuda.is_available():
        raise UserError("tuning needs a CUDA device, and PyTorch finds none")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a config is left in good order
    deadline = time.monotonic() + 60 * options.minutes
    plans = (workload(options.variant, n, options.precision)["launches"] for n in options.batch)
    for launch, best in tune_device(plans, torch.device("cuda"), deadline):
        share = expected_seconds(launch) * 1e6 / best.microseconds
        print(f"{launch.name}: {best.microseconds} us, {share:.0%} of the roofline", flush=True)
    if time.monotonic() > deadline:
        print("out of time; run again to go on")
    print(f"configs are in {user_configs()}")
    return 0
