"""The fused convolution over the layers of YOLOv7, beside cuDNN with bias and activation."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.comparison import Agree, Comparison, close
from yolov7.benchmark.clock import Run, Work, captured
from yolov7.kernels.conv import ConvCall, ConvLaunch
from yolov7.kernels.conv.cases import Record, layer_key, layer_of, meta_call
from yolov7.layers import conv_layers
from yolov7.model import create_model

BATCHES = (1, 32)


@cache
def layers() -> list[Record]:
    """The distinct convolutions of YOLOv7 at 640 pixels, the stem apart."""
    with torch.device("meta"):
        model = create_model("yolov7", form="deploy").fuse()
    records = dict.fromkeys(layer_key(layer) for layer in conv_layers(model, 640, 640))
    return [record for record in records if record.in_channels != 3]


CASES = {
    f"batch {batch}, {layer_of(record, 1).describe()}": (batch, record)
    for batch in BATCHES
    for record in layers()
}
LARGE = {
    name: (batch, record)
    for name, (batch, record) in CASES.items()
    if batch == max(BATCHES) and record.kernel == 3 and record.in_channels >= 256
}


def prepared(
    batch: int, record: Record, dtype: torch.dtype, device: torch.device, smoke: bool
) -> ConvCall:
    """The layer with random content; of a few pixels and channels if only to see that it runs."""
    if smoke:
        sides = (min(record.height, 6), min(record.width, 6))
        channels = (min(record.in_channels, 32), min(record.out_channels, 16))
        batch, record = 1, Record(*channels, record.kernel, record.stride, *sides)
    return meta_call(layer_of(record, batch), dtype).random(device)


def launched(call: ConvCall) -> Run:
    """Our kernel with the config that is looked up, into the call's own output."""
    launch = ConvLaunch([call]).prepare()

    def run() -> Tensor:
        launch()
        return call.out

    return captured(run, call.x.device)


def eager(call: ConvCall) -> Run:
    """PyTorch's convolution in channels_last, then the activation in place."""
    layer = call.layer
    k = layer.kernel
    x = layer.source.to_nchw(call.x).contiguous(memory_format=torch.channels_last)
    weight = call.weight.view(layer.out_channels, k, k, layer.in_channels).permute(0, 3, 1, 2)
    bias = call.bias.to(x.dtype)

    def run() -> Tensor:
        y = F.conv2d(x, weight, bias, stride=layer.stride, padding=k // 2)
        return F.silu(y, inplace=True) if layer.activation == "silu" else y

    return captured(run, x.device)


def work(call: ConvCall) -> Work:
    """Operations, and each map and weight moved once."""
    size = call.x.element_size()
    elements = call.x.numel() + call.weight.numel() + call.out.numel()
    return Work(call.layer.flops, size * elements, call.x.dtype, call.layer.source.n)


def agree(call: ConvCall) -> Agree:
    """Images [n, c, h, w] against our map, to the rounding of fp16."""
    layout = call.layer.target
    return lambda images, matrix: close(2e-3)(images.float(), layout.to_nchw(matrix).float())


@pytest.mark.parametrize(("batch", "record"), CASES.values(), ids=CASES)
def bench_conv(
    batch: int, record: Record, compete: Comparison, kernel_device: torch.device, smoke: bool
) -> None:
    """fp16: ours in one launch, cuDNN's convolution with bias and the activation in two."""
    call = prepared(batch, record, torch.float16, kernel_device, smoke)
    compete({"ours": launched(call), "eager": eager(call)}, agree=agree(call), work=work(call))


@pytest.mark.parametrize(("batch", "record"), LARGE.values(), ids=LARGE)
def bench_conv_fp8(
    batch: int, record: Record, compete: Comparison, kernel_device: torch.device, smoke: bool
) -> None:
    """fp8 beside our own fp16; the numbers are different ones, so there is nothing to agree in."""
    call = prepared(batch, record, torch.float8_e4m3fn, kernel_device, smoke)
    half = prepared(batch, record, torch.float16, kernel_device, smoke)
    compete({"ours": launched(call), "fp16": launched(half)}, agree=None, work=work(call))
