"""Layers without content: which convolutions to compile ahead of time, see `yolov7.kernels.aot`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yolov7.kernels.conv.launch import ConvLaunch, Launch, StemLaunch
from yolov7.kernels.conv.layer import LARGEST, Activation, ConvCall, ConvLayer
from yolov7.kernels.conv.stem import Stem, StemCall
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.runtime import PRECISIONS


@dataclass(frozen=True)
class Record:
    """A convolution of one image; a model's own records have at least these fields."""

    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    height: int
    """Of the input, pixels."""
    width: int
    activation: Activation = "silu"


SAMPLES = (
    Record(3, 32, 3, 1, 640, 640),
    Record(12, 64, 3, 1, 640, 640),
    Record(64, 64, 3, 1, 160, 160),
    Record(128, 128, 3, 2, 160, 160),
    Record(512, 512, 3, 1, 20, 20),
    Record(1024, 256, 1, 1, 40, 40),
    Record(256, 255, 1, 1, 80, 80, "none"),
)
"""A layer of every kind, for want of a model."""


def meta_call(
    layer: ConvLayer, dtype: torch.dtype, *, residual: bool = False, like: str = "meta"
) -> ConvCall:
    """A call with tensors of no content, on the meta device unless ``like`` says another."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=like)

    n = layer.out_channels
    width = -(-n // 16) * 16  # 255 channels of the head are a slice of 256
    return ConvCall(
        layer,
        empty(layer.source.rows, layer.in_channels, dtype=dtype),
        empty(n, layer.taps * layer.in_channels, dtype=dtype),
        empty(n),
        empty(layer.target.rows, width, dtype=dtype)[:, :n],
        empty(n) if dtype in LARGEST else None,
        empty(layer.target.rows, n, dtype=dtype) if residual else None,
    )


def layer_of(record: Any, batch: int, **options: Any) -> ConvLayer:
    """The layer that a record of a model becomes at a batch size."""
    source = PitchedLayout.of(batch, record.height, record.width)
    target = source
    if options.get("pool") or record.stride == 2:
        target = PitchedLayout.of(batch, record.height // 2, record.width // 2)
    elif options.get("upsample"):
        target = PitchedLayout.of(batch, 2 * record.height, 2 * record.width)
    return ConvLayer(
        source,
        target,
        record.in_channels,
        record.out_channels,
        record.kernel,
        record.stride,
        record.activation,
        **options,
    )


def stem_call(record: Any, batch: int, dtype: torch.dtype) -> StemCall:
    """The first layer: 3 channels, or 12 that are 2x2 pixels of an image twice as large."""
    folded = record.in_channels == 12
    kernel, stride = (6, 2) if folded else (record.kernel, record.stride)
    height, width = (side * (2 if folded else 1) for side in (record.height, record.width))
    target = PitchedLayout.of(batch, height // stride, width // stride)
    dtype = torch.float16 if dtype in LARGEST else dtype
    n = record.out_channels
    return StemCall(
        Stem(target, kernel, stride, record.activation),
        torch.empty(batch, height, width, 3, dtype=dtype, device="meta").permute(0, 3, 1, 2),
        torch.empty(n, 3 * kernel**2, dtype=dtype, device="meta"),
        torch.empty(n, device="meta"),
        target.empty(n, dtype=dtype, device="meta"),
    )


def sample_launches(batch: int, dtype: torch.dtype) -> Iterator[Launch]:
    """A layer of every kind, every option of the kernels, and groups."""

    def launch(*layers: ConvLayer, residual: bool = False) -> ConvLaunch:
        return ConvLaunch([meta_call(layer, dtype, residual=residual) for layer in layers])

    for record in SAMPLES:
        if record.in_channels in (3, 12):
            yield StemLaunch(stem_call(record, batch, dtype))
        else:
            yield launch(layer_of(record, batch))
    wide = Record(256, 128, 1, 1, 80, 80)
    yield launch(layer_of(wide, batch, pool=True))
    yield launch(layer_of(wide, batch, upsample=True))
    yield launch(layer_of(wide, batch), residual=True)
    sizes = ((128, 80), (256, 40), (512, 20))
    yield launch(*(layer_of(Record(c, 2 * c, 3, 1, s, s), batch) for c, s in sizes))
    strided = layer_of(Record(256, 256, 3, 2, 80, 80), batch)
    pooled = layer_of(Record(512, 256, 1, 1, 80, 80), batch, pool=True)
    yield launch(strided, pooled)


def compile_cases(
    batch: int = 1, launches: Iterable[Launch] | None = None, precision: str = "fp16"
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches to compile ahead of time, see `yolov7.kernels.runtime.CompileSpec`.

    Args:
        batch: images.
        launches: a model's launches, equal ones once; by default samples of every kind.
        precision: fp16, bf16, fp8, int8 or fp32, of the samples.
    """
    if launches is None:
        launches = sample_launches(batch, PRECISIONS[precision])
    for name, launch in {launch.name: launch for launch in launches}.items():
        yield name, lambda launch=launch: launch.prepare()()  # type: ignore[misc]


def layer_key(record: Any) -> Record:
    """The record without what tells equal layers apart."""
    return Record(
        record.in_channels,
        record.out_channels,
        record.kernel,
        record.stride,
        record.height,
        record.width,
        record.activation,
    )
