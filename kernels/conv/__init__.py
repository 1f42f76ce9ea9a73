"""Fused convolution over pitched maps: ``act(conv(x) * scale + bias) [+ residual]``.

PyTorch runs a convolution, a bias and a SiLU as one library call and one or two passes over the
result; here the result is written once, finished, into any channel slice of any map, so that what
concatenation, max-pool before a 1x1, nearest upsample and residual sums would copy is never moved.

- `layer`: what is computed, and the plain PyTorch reference.
- `tma`: the Hopper kernel. `gather`: the portable one (sm_80 and up). `parts`: what they share.
- `stem`: the first layer, from an image of 3 channels.
- `launcher`: configs and launches; takes preallocated buffers and never allocates.
- `search`: configs worth trying, for the tuner.
"""

from typing import Any

import torch
from torch import Tensor

from yolov7.kernels.conv.cases import compile_cases
from yolov7.kernels.conv.launcher import choose_config, launch_conv, workspace_elements
from yolov7.kernels.conv.layer import (
    ConvCall,
    ConvLayer,
    check_call,
    conv_reference,
    pack_weight,
    quantise_weight,
    to_dtype,
)
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.runtime import triton_op

__all__ = [
    "ConvCall",
    "ConvLayer",
    "check_call",
    "choose_config",
    "compile_cases",
    "conv",
    "conv_reference",
    "launch_conv",
    "pack_weight",
    "quantise_weight",
    "workspace_elements",
]


def _call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    source: list[int],
    target: list[int],
    kernel: int,
    stride: int,
    activation: str,
    options: list[bool],
    scales: list[float],
) -> ConvCall:
    """The call that an operation's plain arguments describe, checked."""
    pool, upsample, exact = options
    layer = ConvLayer(
        PitchedLayout(*source),
        PitchedLayout(*target),
        x.shape[-1],
        weight.shape[0],
        kernel,
        stride,
        activation,
        pool=pool,
        upsample=upsample,
        exact=exact,
        residual_scale=scales[0],
        out_scale=scales[1],
    )
    call = ConvCall(layer, x, weight, bias, out, scale, residual)
    check_call(call)
    return call


def _conv_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    scale: Tensor | None,
    residual: Tensor | None,
    out: Tensor,
    source: list[int],
    target: list[int],
    kernel: int,
    stride: int,
    activation: str,
    options: list[bool],
    scales: list[float],
) -> None:
    call = _call(
        x, weight, bias, scale, residual, out, source, target, kernel, stride, activation,
        options, scales,
    )  # fmt: skip
    config = choose_config([call])
    elements = workspace_elements([call], config)
    workspace = torch.empty(elements, device=x.device) if elements else None
    launch_conv([call], config, workspace)


def _conv_reference(*args: Any) -> None:
    call = _call(*args)
    call.out.copy_(to_dtype(conv_reference(call), call.out.dtype, call.layer.out_scale))


_conv_op = triton_op("conv", _conv_triton, _conv_reference, lambda *_: None, mutates_args=["out"])


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    layer: ConvLayer,
    *,
    out: Tensor | None = None,
    scale: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Convolution, bias, activation and residual of a pitched map.

    Args:
        x: ``[source.rows, in_channels]`` fp16, bf16, fp32 or fp8 e4m3, a channel slice or whole,
            its border zero.
        weight: ``[out_channels, kernel * kernel * in_channels]`` of the same type, from
            `pack_weight` (or `quantise_weight`).
        bias: ``[out_channels]`` fp32.
        layer: sizes and options.
        out: ``[target.rows, out_channels]`` to write, a channel slice or whole; by default new, of
            the input's type (fp16 for fp8).
        scale: ``[out_channels]`` fp32, multiplies the sum: the input's scale times each weight
            row's, for fp8.
        residual: ``[target.rows, out_channels]``, added after the activation.

    Returns:
        ``out``, its border zero.

    Raises:
        ValueError: shapes, types, devices or strides do not fit, or input and output overlap.
    """
    if out is None:
        dtype = torch.float16 if x.dtype == torch.float8_e4m3fn else x.dtype
        out = layer.target.empty(layer.out_channels, dtype=dtype, device=x.device)
    if x.ndim != 2 or (x.shape[1], weight.shape[0]) != (layer.in_channels, layer.out_channels):
        raise ValueError(
            f"input {tuple(x.shape)} and weight {tuple(weight.shape)} do not fit {layer.describe()}"
        )
    _conv_op(
        x, weight, bias, scale, residual, out, layer.source.sizes, layer.target.sizes,
        layer.kernel, layer.stride, layer.activation,
        [layer.pool, layer.upsample, layer.exact], [layer.residual_scale, layer.out_scale],
    )  # fmt: skip
    return out
