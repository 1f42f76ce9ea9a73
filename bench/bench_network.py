"""The network alone, batch 1: ours beside a plain fused forward and torch.compile.

The plain forward is NCHW in fp32, of the same weights, once in a process of its own, as it comes,
and once in ours, whose allocator keeps freed memory for it too. int8 stands beside our fp32.
"""

import pytest
import torch
from torch import Tensor

from bench.baselines.plain import OwnProcess, image, model, sampled
from bench.comparison import Comparison, Missing, close
from bench.eight_bits import calibrated
from yolov7.benchmark.clock import Run, Work
from yolov7.engine.choose import Runtime, open_network
from yolov7.engine.int8 import sums_are_exact
from yolov7.errors import UserError
from yolov7.layers import conv_layers
from yolov7.model import YOLOv7

# Sampled boxes, of which bf16 keeps 8 bits through a hundred layers.
TOLERANCE = {"fp32": 1e-4, "bf16": 1e-2}
INT8 = 5e-2  # what AP loses is in docs/accuracy.md
CASES = {
    f"{variant}, {precision}": (variant, precision)
    for precision in TOLERANCE
    for variant in ("yolov7-tiny", "yolov7")
}


def compiled(network: YOLOv7, x: Tensor, precision: str) -> Run | Missing:
    """Our `compile` engine."""
    try:
        fast = open_network(
            Runtime(weights=network, device="cpu", precision=precision, engine="compile")
        )
    except UserError as error:
        return Missing(str(error))
    return lambda: sampled(fast(x))


@pytest.mark.parametrize("variant", ["yolov7-tiny", "yolov7-tiny-silu", "yolov7"])
def bench_int8(variant: str, compete: Comparison, device: torch.device, smoke: bool) -> None:
    """Decoded boxes of a 640-pixel image on a CPU, beside our own fp32."""
    if device.type != "cpu" or not sums_are_exact():
        pytest.skip("of a CPU with VNNI or AMX")
    x = image(64 if smoke else 640)
    weights = calibrated(model(variant), x)
    ours, eager = (
        open_network(Runtime(weights=weights, device="cpu", precision=precision, engine="eager"))
        for precision in ("int8", "fp32")
    )
    contenders: dict[str, Run | Missing] = {
        "ours": lambda: sampled(ours(x)),
        "eager fp32": lambda: sampled(eager(x)),
    }
    compete(contenders, agree=close(INT8), work=Work(items=1))


@pytest.mark.parametrize(("variant", "precision"), CASES.values(), ids=CASES)
def bench_network(
    variant: str,
    precision: str,
    compete: Comparison,
    device: torch.device,
    smoke: bool,
    request: pytest.FixtureRequest,
) -> None:
    """Decoded boxes of a 640-pixel image on a CPU."""
    if device.type != "cpu":
        pytest.skip("of a machine without a GPU; bench_engine is that of the others")
    size = 64 if smoke else 640
    x = image(size)
    ours = open_network(
        Runtime(weights=model(variant), device="cpu", precision=precision, engine="eager")
    )
    plain = model(variant).fuse()
    process = OwnProcess("bench.baselines.plain", variant, size)
    request.session.addfinalizer(process.close)

    @torch.inference_mode()
    def run() -> Tensor:
        return sampled(plain(x))

    slow = Missing("takes half a minute to start")
    contenders: dict[str, Run | Missing] = {
        "ours": lambda: sampled(ours(x)),
        "plain": lambda: process().view(-1, 5),
        "plain in our process": run,
        "compile": slow if smoke else compiled(model(variant), x, precision),
    }

    flops = sum(layer.flops for layer in conv_layers(model(variant).fuse(), size, size))
    dtype = torch.float32 if precision == "fp32" else torch.bfloat16
    work = Work(flops=flops, dtype=dtype, items=1)
    compete(contenders, agree=close(TOLERANCE[precision]), work=work)
