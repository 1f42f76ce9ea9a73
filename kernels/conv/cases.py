"""Which convolutions to compile ahead of time; see `yolov7.kernels.aot`."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from yolov7.kernels.conv.launcher import choose_config, config_kind, launch_conv, workspace_elements
from yolov7.kernels.conv.layer import ConvCall, ConvLayer
from yolov7.kernels.conv.stem import Stem, launch_stem, stem_config
from yolov7.kernels.layout import PitchedLayout

DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp32": torch.float32,
}


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
    activation: str = "silu"


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

    fp8 = dtype == torch.float8_e4m3fn
    n = layer.out_channels
    width = -(-n // 16) * 16  # 255 channels of the head are a slice of 256
    return ConvCall(
        layer,
        empty(layer.source.rows, layer.in_channels, dtype=dtype),
        empty(n, layer.taps * layer.in_channels, dtype=dtype),
        empty(n),
        empty(layer.target.rows, width, dtype=dtype)[:, :n],
        empty(n) if fp8 else None,
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


def _launch(calls: list[ConvCall]) -> None:
    config = choose_config(calls)
    elements = workspace_elements(calls, config)
    launch_conv(calls, config, torch.empty(elements, device=calls[0].x.device))


def _launch_meta_stem(stem: Stem, height: int, width: int, out_channels: int, dtype: Any) -> None:
    images = torch.empty(stem.target.n, height, width, 3, dtype=dtype, device="meta")
    images = images.permute(0, 3, 1, 2)
    weight = torch.empty(out_channels, 3 * stem.kernel**2, dtype=dtype, device="meta")
    bias = torch.empty(out_channels, device="meta")
    out = stem.target.empty(out_channels, dtype=dtype, device="meta")
    launch_stem(stem, images, weight, bias, out, stem_config(stem, images, out))


def _stem_case(record: Any, batch: int, dtype: Any) -> tuple[str, Callable[[], None]]:
    """The first layer: 3 channels, or 12 that are 2x2 pixels of an image twice as large."""
    folded = record.in_channels == 12
    kernel, stride = (6, 2) if folded else (record.kernel, record.stride)
    height, width = (side * (2 if folded else 1) for side in (record.height, record.width))
    target = PitchedLayout.of(batch, height // stride, width // stride)
    stem = Stem(target, kernel, stride, record.activation)
    name = f"{batch}x3x{height}x{width} -> {record.out_channels}, {kernel}x{kernel} s{stride} stem"
    dtype = torch.float16 if dtype == torch.float8_e4m3fn else dtype
    n = record.out_channels
    return name, lambda: _launch_meta_stem(stem, height, width, n, dtype)


def compile_cases(
    batch: int = 1,
    layers: Iterable[Any] = SAMPLES,
    precision: str = "fp16",
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches to compile ahead of time, see `yolov7.kernels.runtime.CompileSpec`.

    Args:
        batch: images.
        layers: a model's convolutions; each distinct one once, then every option of the kernel on
            one of them.
        precision: fp16, bf16, fp8 or fp32.
    """
    dtype = DTYPES[precision]
    distinct = dict.fromkeys(layer_key(r) for r in layers)
    for record in distinct:
        if record.in_channels in (3, 12):
            yield _stem_case(record, batch, dtype)
            continue
        call = meta_call(layer_of(record, batch), dtype)
        yield _name(call), lambda call=call: _launch([call])  # type: ignore[misc]
    wide = Record(256, 128, 1, 1, 80, 80)
    optional = {
        "pool": meta_call(layer_of(wide, batch, pool=True), dtype),
        "upsample": meta_call(layer_of(wide, batch, upsample=True), dtype),
        "residual": meta_call(layer_of(wide, batch), dtype, residual=True),
    }
    for option, call in optional.items():
        label = " residual" if option == "residual" else ""
        yield _name(call) + label, lambda call=call: _launch([call])  # type: ignore[misc]
    sizes = ((128, 80), (256, 40), (512, 20))
    group = [meta_call(layer_of(Record(c, 2 * c, 3, 1, s, s), batch), dtype) for c, s in sizes]
    yield f"{_name(group[0])} and two more, grouped", lambda: _launch(group)
    strided = meta_call(layer_of(Record(256, 256, 3, 2, 80, 80), batch), dtype)
    pooled = meta_call(layer_of(Record(512, 256, 1, 1, 80, 80), batch, pool=True), dtype)
    yield f"{_name(strided)} and pooled, grouped", lambda: _launch([strided, pooled])


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


def _name(call: ConvCall) -> str:
    return f"{call.layer.describe()} {config_kind([call]).rpartition('-')[2]}"
