"""Starting the convolution kernels: which path, which grid, which arguments."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from yolov7.kernels.conv.config import ConvConfig
from yolov7.kernels.conv.gather import conv_gather_kernel
from yolov7.kernels.conv.layer import ConvCall, epilogue_activation
from yolov7.kernels.conv.parts import Geometry, Scales, conv_reduce_kernel
from yolov7.kernels.conv.tma import conv_tma_kernel
from yolov7.kernels.runtime import TensorDescriptor, launch, processors, rounding, triton

MAX_GROUPS = 3


def tiles(calls: Sequence[ConvCall], block_m: int, block_n: int) -> int:
    """Tiles of all layers together."""
    sizes = ((c.layer.compute.rows, c.layer.out_channels) for c in calls)
    return sum(-(-rows // block_m) * -(-columns // block_n) for rows, columns in sizes)


def long_fp8_sum(calls: Sequence[ConvCall]) -> bool:
    """Whether a sum of fp8 products is so long that it needs more than 14 bits."""
    return any(c.x.dtype == torch.float8_e4m3fn and c.layer.length >= 1024 for c in calls)


def workspace_elements(calls: Sequence[ConvCall], config: ConvConfig) -> int:
    """Elements of 32 bits of workspace that `launch_conv` needs for these calls and this config."""
    if config.split_k == 1:
        return 0
    return sum(config.split_k * c.layer.compute.rows * c.layer.out_channels for c in calls)


def launch_conv(
    calls: Sequence[ConvCall], config: ConvConfig, workspace: Tensor | None = None
) -> None:
    """Run independent convolutions in one launch (two with split-K).

    Args:
        calls: one to three layers that agree in everything but sizes; a 1x1 behind a max-pool may
            stand beside a 3x3 of stride 2. Nothing is validated here; `ConvLaunch.prepare`
            does that once.
        config: how.
        workspace: `workspace_elements` of fp32, whatever is summed; needed for ``split_k > 1``.
    """
    count = config.split_k * tiles(calls, config.block_m, config.block_n)
    if not count:
        return
    layer = calls[0].layer
    options = config.options("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K")
    shared = {
        "scale_ptrs": tuple(c.scale for c in calls),
        "bias_ptrs": tuple(c.bias for c in calls),
        "residual_ptrs": tuple(c.residual for c in calls),
        "partial_ptrs": _partials(calls, config, workspace),
        "shapes": tuple(_geometry(c) for c in calls),
        "scales": tuple(_scales(c) for c in calls),
        "UPSAMPLE": layer.upsample,
        "ACTIVATION": epilogue_activation(layer.activation, calls[0].out.dtype),
        "PDL": config.launch_pdl,
    }
    product = {
        "weight_ptrs": tuple(c.weight for c in calls),
        "PRECISION": rounding(calls[0].x, exact=layer.exact),
        "PROMOTE": long_fp8_sum(calls),
        **shared,
    }
    if config.tma:
        programs = min(count, processors(calls[0].x.device) * config.occupancy)
        args = {
            "GROUPS": len(calls),
            "KERNEL": layer.kernel,
            **_descriptors(calls, config),
            **product,
        }
        launch(conv_tma_kernel, (programs,), args, options)
    else:
        args = {
            "x_ptrs": tuple(c.x for c in calls),
            "out_ptrs": tuple(c.out for c in calls),
            "KERNELS": tuple(c.layer.kernel for c in calls),
            "REDUCTION": layer.reduction,
            "EVEN_K": all(c.layer.in_channels % config.block_k == 0 for c in calls),
            **product,
        }
        launch(conv_gather_kernel, (count,), args, options)
    if config.split_k > 1:
        _launch_reduce(calls, shared, config)


def _geometry(call: ConvCall) -> Geometry:
    layer = call.layer
    computed, source, target = layer.compute, layer.source, layer.target
    return Geometry(
        computed.rows,
        computed.h,
        computed.w,
        computed.pitch,
        computed.row_pitch,
        layer.in_channels,
        layer.out_channels,
        source.rows,
        source.pitch,
        source.row_pitch,
        target.pitch,
        target.row_pitch,
        call.x.stride(0),
        0 if call.residual is None else call.residual.stride(0),
        call.out.stride(0),
    )


def _scales(call: ConvCall) -> Scales:
    return Scales(float(call.layer.residual_scale), float(call.layer.out_scale))


def _partials(
    calls: Sequence[ConvCall], config: ConvConfig, workspace: Tensor | None
) -> tuple[Tensor | None, ...]:
    if config.split_k == 1:
        return (None,) * len(calls)
    needed = workspace_elements(calls, config)
    if workspace is None or workspace.numel() < needed:
        raise ValueError(f"split-K needs a workspace of {needed} fp32 elements")
    sizes = [workspace_elements([c], config) for c in calls]
    if calls[0].x.dtype == torch.int8:  # whose sums are exact
        workspace = workspace.view(torch.int32)
    return tuple(workspace[:needed].split(sizes))


def _descriptors(calls: Sequence[ConvCall], config: ConvConfig) -> dict[str, Any]:
    """Tensor descriptors by argument; None for the layers that the group lacks."""
    m, n, k = config.block_m, config.block_n, config.block_k
    args: dict[str, Any] = {}
    for i in range(MAX_GROUPS):
        call = calls[i] if i < len(calls) else None
        args[f"x_desc_{i}"] = call and TensorDescriptor.from_tensor(call.x, [m, k])
        args[f"weight_desc_{i}"] = call and TensorDescriptor.from_tensor(call.weight, [n, k])
        by_pointer = call is None or call.layer.upsample
        out = call and call.out
        args[f"out_{i}"] = out if by_pointer else TensorDescriptor.from_tensor(out, [m, n])
    return args


def _launch_reduce(calls: Sequence[ConvCall], shared: dict[str, Any], config: ConvConfig) -> None:
    rows = max(c.layer.compute.rows for c in calls)
    n_out = max(c.layer.out_channels for c in calls)
    block_n = min(128, max(16, triton.next_power_of_2(n_out)))
    block_m = 2048 // block_n
    args = {
        "out_ptrs": tuple(c.out for c in calls),
        "GROUPS": len(calls),
        "SPLIT_K": config.split_k,
        **shared,
    }
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4}
    if config.launch_pdl:
        options["launch_pdl"] = 1
    grid = (-(-rows // block_m), -(-n_out // block_n), len(calls))
    launch(conv_reduce_kernel, grid, args, options)
