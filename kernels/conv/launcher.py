"""Starting the convolution kernels: which path, which config, which grid."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from yolov7.kernels.conv.gather import conv_gather_kernel
from yolov7.kernels.conv.layer import ConvCall, ConvLayer, epilogue_activation
from yolov7.kernels.conv.parts import conv_reduce_kernel
from yolov7.kernels.conv.tma import conv_tma_kernel
from yolov7.kernels.runtime import Config, capability, find_config, launch, processors

MAX_GROUPS = 3
_LAUNCHER_KEYS = ("TMA", "OCCUPANCY")
_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "fp8",
    torch.float32: "fp32",
}


def config_kind(layer: ConvLayer, dtype: torch.dtype) -> str:
    """What configs of the JSON file are for: ``3x3s1-fp16``, ``1x1s1-pool-fp8``."""
    option = "-pool" if layer.pool else "-upsample" if layer.upsample else ""
    precision = "exact" if _exact(layer, dtype) else _NAMES[dtype]
    return f"{layer.kernel}x{layer.kernel}s{layer.stride}{option}-{precision}"


def config_size(layer: ConvLayer) -> tuple[int, int, int]:
    """(rows, output channels, length of the sum): the size that configs are looked up by."""
    return layer.compute.rows, layer.out_channels, layer.taps * layer.in_channels


def choose_config(call: ConvCall) -> Config:
    """The tuned config of the nearest layer on this device, or the default one."""
    kind = config_kind(call.layer, call.x.dtype)
    default = default_config(call)
    config = find_config("conv", kind, config_size(call.layer), default, call.x.device)
    return config if not config["TMA"] or fits_tma(call) else default


def fits_tma(call: ConvCall) -> bool:
    """Whether tensor descriptors can read and write this call's maps (16-byte bases, strides)."""
    layer = call.layer
    tensors = [call.x, call.weight] if layer.upsample else [call.x, call.weight, call.out]
    return (
        layer.reduction == 1
        and not _exact(layer, call.x.dtype)
        and all(t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
        and all(t.storage_offset() * t.element_size() % 16 == 0 for t in tensors)
    )


def default_config(call: ConvCall) -> Config:
    """A config from counted tiles, for devices and sizes that nobody tuned.

    The largest tile that keeps three quarters of the processors busy, since what limits a large
    layer is the traffic from the L2 cache, (1 / BLOCK_M + 1 / BLOCK_N) per operation; where none
    does, tiles of 64 x 64 and the sum split over the idle processors. No choice spills registers
    on sm_80, 89, 90 or 100; that is held by the ahead-of-time tests.
    """
    layer, device = call.layer, call.x.device
    rows, n_out, _ = config_size(layer)
    units = processors(device)
    hopper = (9, 0) <= capability(device) < (10, 0)
    tma = capability(device) >= (9, 0) and fits_tma(call)
    sizes = _TMA_TILES if tma else _GATHER_TILES
    width = max(16, _power_of_two(n_out))
    fitting = [(m, n) for m, n in sizes if n <= width] or [(64, width)]
    exact = _exact(layer, call.x.dtype)
    if exact:
        fitting = [(64, min(32, width))]  # multiplied one by one: operands live in registers
    elif not _plain_store(call) or _long_fp8_sum(call) or not hopper:  # larger ones spill
        largest = 64 * 64 if call.out.dtype == torch.float32 else 128 * 128
        fitting = [(m, n) for m, n in fitting if m * n <= largest]
    filled = (tile for tile in fitting if _busy(_tiles(rows, n_out, *tile), units) >= 0.75)
    block_m, block_n = next(filled, fitting[-1])
    block_k = _block_k(call, tma)
    tiles = _tiles(rows, n_out, block_m, block_n)
    steps = layer.taps * -(-layer.in_channels // block_k)
    # A second launch pays where it takes at least a dozen steps away from each program.
    split = max(1, min(2 * units // tiles, steps // 12, 8)) if 0 < tiles < units else 1
    config = {
        "TMA": int(tma),
        "BLOCK_M": block_m,
        "BLOCK_N": block_n,
        "BLOCK_K": block_k,
        "SPLIT_K": 1 << (split.bit_length() - 1),
    }
    if not tma:
        roomy = capability(device) >= (9, 0)
        stages = 2 if layer.pool or exact else 4 if roomy else 3
        config |= {"num_warps": 4, "num_stages": stages}
        if block_m * block_n <= 64 * 64:
            config["maxnreg"] = 168  # left alone, ptxas aims lower and spills a register or two
        return config | ({"launch_pdl": 1} if capability(device) >= (9, 0) else {})
    staged = block_m * block_n * call.out.element_size() * (1 if call.residual is None else 2)
    stage = (block_m + block_n) * block_k * call.x.element_size()
    large = block_m * block_n >= (128 * 128 if hopper else 128 * 64)
    occupancy = 1 if large else 2
    # Overlapping one tile's store with the next one's loads takes registers and a second tile.
    several = tiles * config["SPLIT_K"] > units * occupancy
    return {
        **config,
        "num_warps": 8 if large else 4,
        "num_stages": min(4, (_SHARED_BYTES - staged) // stage),
        "FLATTEN": int(hopper and several and _plain_store(call)),
        "OCCUPANCY": occupancy,
        "launch_pdl": 1,
    }


_TMA_TILES = ((128, 256), (256, 128), (128, 128), (256, 64), (128, 64), (64, 64))
_GATHER_TILES = ((64, 128), (64, 64))
_SHARED_BYTES = 224 * 1024  # of Hopper's 227 KiB; the rest holds barriers


def _long_fp8_sum(call: ConvCall) -> bool:
    """Whether a sum of fp8 products is so long that it needs more than 14 bits."""
    return call.x.dtype == torch.float8_e4m3fn and config_size(call.layer)[2] >= 1024


def _exact(layer: ConvLayer, dtype: torch.dtype) -> bool:
    """Whether products are those of fp32, which no matrix instruction computes."""
    return layer.exact and dtype == torch.float32


def _plain_store(call: ConvCall) -> bool:
    """Whether the tile leaves through the small epilogue: 16 bits or less, nothing to add."""
    plain = call.residual is None and not call.layer.upsample
    return plain and call.out.dtype != torch.float32


def _block_k(call: ConvCall, tma: bool) -> int:
    """128 bytes along the sum, the widest swizzle, or 64 where shared memory is scarce."""
    size = call.x.element_size()
    if _exact(call.layer, call.x.dtype):
        return 16
    roomy = tma or capability(call.x.device) >= (9, 0)
    smallest = 32 if size == 1 else 16
    return max(smallest, min((128 if roomy else 64) // size, _power_of_two(call.layer.in_channels)))


def _busy(tiles: int, units: int) -> float:
    """Share of the processors' time that this many equal tiles fill."""
    return tiles / (-(-tiles // units) * units) if tiles else 0.0


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _tiles(rows: int, columns: int, block_m: int, block_n: int) -> int:
    return -(-rows // block_m) * -(-columns // block_n)


def workspace_elements(layers: Sequence[ConvLayer], config: Config) -> int:
    """fp32 elements of workspace that `launch_conv` needs for these layers and this config."""
    if config["SPLIT_K"] == 1:
        return 0
    return sum(config["SPLIT_K"] * layer.compute.rows * layer.out_channels for layer in layers)


def launch_conv(calls: Sequence[ConvCall], config: Config, workspace: Tensor | None = None) -> None:
    """Run convolutions of one kind in one launch (two with split-K).

    Args:
        calls: one to three independent layers that agree in everything but sizes. Nothing is
            validated here; `check_call` does that once, when buffers are planned.
        config: ``TMA`` (1: the Hopper kernel, 0: the portable one), ``BLOCK_M``, ``BLOCK_N``,
            ``BLOCK_K``, ``SPLIT_K``, ``num_warps``, ``num_stages``, from sm_90 on ``launch_pdl``,
            and for the Hopper kernel ``FLATTEN`` and ``OCCUPANCY`` (programs per processor).
        workspace: `workspace_elements` of fp32, needed for ``SPLIT_K > 1``.
    """
    layer = calls[0].layer
    constexprs = {
        "GROUPS": len(calls),
        "KERNEL": layer.kernel,
        "UPSAMPLE": layer.upsample,
        "ACTIVATION": epilogue_activation(layer.activation, calls[0].out.dtype),
        "PRECISION": "ieee" if layer.exact else "tf32",
        "PROMOTE": any(_long_fp8_sum(c) for c in calls),
    }
    partials = _partials(calls, config, workspace)
    options = {key: value for key, value in config.items() if key not in _LAUNCHER_KEYS}
    tiles = config["SPLIT_K"] * sum(
        _tiles(c.layer.compute.rows, c.layer.out_channels, config["BLOCK_M"], config["BLOCK_N"])
        for c in calls
    )
    if not tiles:
        return
    shared = {
        "scale_ptrs": tuple(c.scale for c in calls),
        "bias_ptrs": tuple(c.bias for c in calls),
        "residual_ptrs": tuple(c.residual for c in calls),
        "partial_ptrs": partials,
        "shapes": tuple(_shape(c) for c in calls),
        "scales": tuple(_scales(c) for c in calls),
        "PDL": bool(config.get("launch_pdl", 0)),
        **constexprs,
    }
    if config["TMA"]:
        programs = min(tiles, processors(calls[0].x.device) * config["OCCUPANCY"])
        args = {**_descriptors(calls, config), **shared}
        launch(conv_tma_kernel, (programs,), args, options)
    else:
        args = {
            "x_ptrs": tuple(c.x for c in calls),
            "weight_ptrs": tuple(c.weight for c in calls),
            "out_ptrs": tuple(c.out for c in calls),
            "REDUCTION": layer.reduction,
            "POOL": layer.pool,
            "EVEN_K": all(c.layer.in_channels % config["BLOCK_K"] == 0 for c in calls),
            **shared,
        }
        launch(conv_gather_kernel, (tiles,), args, options)
    if config["SPLIT_K"] > 1:
        for call, partial in zip(calls, partials, strict=True):
            _launch_reduce(call, partial, config)


def _shape(call: ConvCall) -> tuple[tuple[int, ...], ...]:
    """The geometry as the kernels take it; see `yolov7.kernels.conv.parts`."""
    layer = call.layer
    computed, source, target = layer.compute, layer.source, layer.target
    residual_stride = 0 if call.residual is None else call.residual.stride(0)
    return (
        (computed.rows, computed.h, computed.w, computed.pitch, computed.row_pitch),
        (layer.in_channels, layer.out_channels),
        (source.rows, source.pitch, source.row_pitch),
        (target.pitch, target.row_pitch),
        (call.x.stride(0), residual_stride, call.out.stride(0)),
    )


def _scales(call: ConvCall) -> tuple[float, float]:
    return float(call.layer.residual_scale), float(call.layer.out_scale)


def _partials(
    calls: Sequence[ConvCall], config: Config, workspace: Tensor | None
) -> tuple[Tensor | None, ...]:
    if config["SPLIT_K"] == 1:
        return (None,) * len(calls)
    needed = workspace_elements([c.layer for c in calls], config)
    if workspace is None or workspace.numel() < needed:
        raise ValueError(f"split-K needs a workspace of {needed} fp32 elements")
    sizes = [workspace_elements([c.layer], config) for c in calls]
    return tuple(workspace[:needed].split(sizes))


def _descriptors(calls: Sequence[ConvCall], config: Config) -> dict[str, Any]:
    """Tensor descriptors by argument; None for the layers that the group lacks."""
    m, n, k = config["BLOCK_M"], config["BLOCK_N"], config["BLOCK_K"]
    args: dict[str, Any] = {}
    for i in range(MAX_GROUPS):
        call = calls[i] if i < len(calls) else None
        args[f"x_desc_{i}"] = call and TensorDescriptor.from_tensor(call.x, [m, k])
        args[f"weight_desc_{i}"] = call and TensorDescriptor.from_tensor(call.weight, [n, k])
        by_pointer = call is None or call.layer.upsample
        out = call and call.out
        args[f"out_{i}"] = out if by_pointer else TensorDescriptor.from_tensor(out, [m, n])
    return args


def _launch_reduce(call: ConvCall, partial: Tensor | None, config: Config) -> None:
    rows, n_out = call.layer.compute.rows, call.layer.out_channels
    block_n = min(128, max(16, _power_of_two(n_out)))
    block_m = 2048 // block_n
    args = {
        "partial_ptr": partial,
        "scale_ptr": call.scale,
        "bias_ptr": call.bias,
        "residual_ptr": call.residual,
        "out_ptr": call.out,
        "shape": _shape(call),
        "scales": _scales(call),
        "ACTIVATION": epilogue_activation(call.layer.activation, call.out.dtype),
        "UPSAMPLE": call.layer.upsample,
        "SPLIT_K": config["SPLIT_K"],
        "PDL": bool(config.get("launch_pdl", 0)),
    }
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4}
    if "launch_pdl" in config:
        options["launch_pdl"] = config["launch_pdl"]
    grid = (-(-rows // block_m), -(-n_out // block_n))
    launch(conv_reduce_kernel, grid, args, options)
