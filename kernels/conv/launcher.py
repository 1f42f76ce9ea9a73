"""Starting the convolution kernels: which path, which config, which grid."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from yolov7.kernels.conv.gather import conv_gather_kernel
from yolov7.kernels.conv.layer import DTYPE_NAMES, ConvCall, epilogue_activation
from yolov7.kernels.conv.parts import conv_reduce_kernel
from yolov7.kernels.conv.tma import conv_tma_kernel
from yolov7.kernels.runtime import Config, capability, find_config, launch, processors

MAX_GROUPS = 3
_LAUNCHER_KEYS = ("TMA", "OCCUPANCY")


def config_kind(calls: Sequence[ConvCall]) -> str:
    """What configs of the JSON file are for: ``3x3s1-fp16``, ``3x3s2+1x1s1-pool-to-fp16-fp8``.

    The types of outputs belong to it where they are another than the inputs': a tile of the output
    waits in shared memory, and twice as wide it may leave no room for the pipeline.
    """
    kinds = []
    for call in calls:
        layer = call.layer
        marks = {"pool": layer.pool, "upsample": layer.upsample, "sum": call.residual is not None}
        marks[f"to-{DTYPE_NAMES[call.out.dtype]}"] = call.out.dtype != call.x.dtype
        options = "".join(f"-{name}" for name, on in marks.items() if on)
        kinds.append(f"{layer.kernel}x{layer.kernel}s{layer.stride}{options}")
    precision = "exact" if calls[0].exact else DTYPE_NAMES[calls[0].x.dtype]
    return f"{'+'.join(kinds)}-{precision}"


def config_size(calls: Sequence[ConvCall]) -> tuple[int, ...]:
    """Rows, output channels and length of the sum of each layer: what configs are looked up by."""
    layers = [c.layer for c in calls]
    return tuple(n for x in layers for n in (x.compute.rows, x.out_channels, x.length))


def choose_config(calls: Sequence[ConvCall]) -> Config:
    """The tuned config of the nearest launch on this device, or the default one."""
    kind, size = config_kind(calls), config_size(calls)
    default = default_config(calls)
    config = find_config(kind, size, default, calls[0].x.device)
    return config if not config["TMA"] or fits_tma(calls) else default


def fits_tma(calls: Sequence[ConvCall]) -> bool:
    """Whether tensor descriptors can read and write these maps (16-byte bases, strides)."""
    return not calls[0].exact and all(map(_fits_tma, calls))


def _fits_tma(call: ConvCall) -> bool:
    layer = call.layer
    tensors = [call.x, call.weight] if layer.upsample else [call.x, call.weight, call.out]
    return (
        layer.reduction == 1
        and all(t.stride(0) * t.element_size() % 16 == 0 for t in tensors)
        and all(t.storage_offset() * t.element_size() % 16 == 0 for t in tensors)
    )


def default_config(calls: Sequence[ConvCall]) -> Config:
    """A config from counted tiles, for devices and sizes that nobody tuned.

    The largest tile that keeps three quarters of the processors busy, since what limits a large
    layer is the traffic from the L2 cache, (1 / BLOCK_M + 1 / BLOCK_N) per operation; where none
    does, tiles of 64 x 64 and the sum split over the idle processors. No choice spills registers
    on sm_80, 89, 90 or 100; that is held by the ahead-of-time tests.
    """
    device = calls[0].x.device
    units = processors(device)
    roomy = capability(device) >= (9, 0)
    hopper = roomy and capability(device) < (10, 0)
    tma = roomy and fits_tma(calls)
    sizes = _TMA_TILES if tma else _GATHER_TILES
    width = max(16, _power_of_two(max(c.layer.out_channels for c in calls)))
    fitting = [(m, n) for m, n in sizes if n <= width] or [(64, width)]
    exact, plain = calls[0].exact, all(map(_plain_store, calls))
    item = max(c.out.element_size() for c in calls)
    if exact:
        fitting = [(64, min(32, width))]  # multiplied one by one: operands live in registers
    elif not plain or _long_fp8_sum(calls) or not hopper:  # larger ones spill
        cramped = item == 4 or (len(calls) > 1 and not roomy)
        largest = 64 * 64 if cramped else 128 * 128
        fitting = [(m, n) for m, n in fitting if m * n <= largest]
    filled = (tile for tile in fitting if _busy(_tiles(calls, *tile), units) >= 0.75)
    block_m, block_n = next(filled, fitting[-1])
    block_k = _block_k(calls, tma)
    tiles = _tiles(calls, block_m, block_n)
    steps = max(c.layer.taps * -(-c.layer.in_channels // block_k) for c in calls)
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
        config |= {"num_warps": 4, "num_stages": 2 if exact else 4 if roomy else 3}
        if block_m * block_n <= 64 * 64:
            config["maxnreg"] = 168  # left alone, ptxas aims lower and spills a register or two
        return config | ({"launch_pdl": 1} if roomy else {})
    added = any(c.residual is not None for c in calls)
    staged = block_m * block_n * item * (2 if added else 1)
    stage = (block_m + block_n) * block_k * calls[0].x.element_size()
    large = block_m * block_n >= (128 * 128 if hopper else 128 * 64)
    occupancy = 1 if large else 2
    # Overlapping one tile's store with the next one's loads takes registers and a second tile.
    several = tiles * config["SPLIT_K"] > units * occupancy
    return {
        **config,
        "num_warps": 8 if large else 4,
        "num_stages": min(4, (_SHARED_BYTES - staged) // stage),
        "FLATTEN": int(hopper and several and plain),
        "OCCUPANCY": occupancy,
        "launch_pdl": 1,
    }


_TMA_TILES = ((128, 256), (256, 128), (128, 128), (256, 64), (128, 64), (64, 64))
_GATHER_TILES = ((64, 128), (64, 64))
_SHARED_BYTES = 224 * 1024  # of Hopper's 227 KiB; the rest holds barriers


def _long_fp8_sum(calls: Sequence[ConvCall]) -> bool:
    """Whether a sum of fp8 products is so long that it needs more than 14 bits."""
    return any(c.x.dtype == torch.float8_e4m3fn and c.layer.length >= 1024 for c in calls)


def _plain_store(call: ConvCall) -> bool:
    """Whether the tile leaves through the small epilogue: 16 bits or less, nothing to add."""
    plain = call.residual is None and not call.layer.upsample
    return plain and call.out.dtype != torch.float32


def _block_k(calls: Sequence[ConvCall], tma: bool) -> int:
    """128 bytes along the sum, the widest swizzle, or 64 where shared memory is scarce."""
    size = calls[0].x.element_size()
    if calls[0].exact:
        return 16
    roomy = tma or capability(calls[0].x.device) >= (9, 0)
    smallest = 32 if size == 1 else 16
    widest = _power_of_two(max(c.layer.in_channels for c in calls))
    return max(smallest, min((128 if roomy else 64) // size, widest))


def _busy(tiles: int, units: int) -> float:
    """Share of the processors' time that this many equal tiles fill."""
    return tiles / (-(-tiles // units) * units) if tiles else 0.0


def _power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _tiles(calls: Sequence[ConvCall], block_m: int, block_n: int) -> int:
    """Tiles of all layers together."""
    sizes = ((c.layer.compute.rows, c.layer.out_channels) for c in calls)
    return sum(-(-rows // block_m) * -(-columns // block_n) for rows, columns in sizes)


def workspace_elements(calls: Sequence[ConvCall], config: Config) -> int:
    """fp32 elements of workspace that `launch_conv` needs for these calls and this config."""
    if config["SPLIT_K"] == 1:
        return 0
    return sum(config["SPLIT_K"] * c.layer.compute.rows * c.layer.out_channels for c in calls)


def launch_conv(calls: Sequence[ConvCall], config: Config, workspace: Tensor | None = None) -> None:
    """Run independent convolutions in one launch (two with split-K).

    Args:
        calls: one to three layers that agree in everything but sizes; a 1x1 behind a max-pool may
            stand beside a 3x3 of stride 2. Nothing is validated here; `check_call` does that once,
            when buffers are planned.
        config: ``TMA`` (1: the Hopper kernel, 0: the portable one), ``BLOCK_M``, ``BLOCK_N``,
            ``BLOCK_K``, ``SPLIT_K``, ``num_warps``, ``num_stages``, from sm_90 on ``launch_pdl``,
            and for the Hopper kernel ``FLATTEN`` and ``OCCUPANCY`` (programs per processor).
        workspace: `workspace_elements` of fp32, needed for ``SPLIT_K > 1``.
    """
    tiles = config["SPLIT_K"] * _tiles(calls, config["BLOCK_M"], config["BLOCK_N"])
    if not tiles:
        return
    layer = calls[0].layer
    options = {key: value for key, value in config.items() if key not in _LAUNCHER_KEYS}
    shared = {
        "scale_ptrs": tuple(c.scale for c in calls),
        "bias_ptrs": tuple(c.bias for c in calls),
        "residual_ptrs": tuple(c.residual for c in calls),
        "partial_ptrs": _partials(calls, config, workspace),
        "shapes": tuple(_shape(c) for c in calls),
        "scales": tuple(_scales(c) for c in calls),
        "UPSAMPLE": layer.upsample,
        "ACTIVATION": epilogue_activation(layer.activation, calls[0].out.dtype),
        "PDL": bool(config.get("launch_pdl", 0)),
    }
    product = {
        "PRECISION": "ieee" if layer.exact else "tf32",
        "PROMOTE": _long_fp8_sum(calls),
        **shared,
    }
    if config["TMA"]:
        programs = min(tiles, processors(calls[0].x.device) * config["OCCUPANCY"])
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
            "weight_ptrs": tuple(c.weight for c in calls),
            "out_ptrs": tuple(c.out for c in calls),
            "KERNELS": tuple(c.layer.kernel for c in calls),
            "REDUCTION": layer.reduction,
            "EVEN_K": all(c.layer.in_channels % config["BLOCK_K"] == 0 for c in calls),
            **product,
        }
        launch(conv_gather_kernel, (tiles,), args, options)
    if config["SPLIT_K"] > 1:
        _launch_reduce(calls, shared, config)


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
    needed = workspace_elements(calls, config)
    if workspace is None or workspace.numel() < needed:
        raise ValueError(f"split-K needs a workspace of {needed} fp32 elements")
    sizes = [workspace_elements([c], config) for c in calls]
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


def _launch_reduce(calls: Sequence[ConvCall], shared: dict[str, Any], config: Config) -> None:
    rows = max(c.layer.compute.rows for c in calls)
    n_out = max(c.layer.out_channels for c in calls)
    block_n = min(128, max(16, _power_of_two(n_out)))
    block_m = 2048 // block_n
    args = {
        "out_ptrs": tuple(c.out for c in calls),
        "GROUPS": len(calls),
        "SPLIT_K": config["SPLIT_K"],
        **shared,
    }
    options = {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": 4}
    if "launch_pdl" in config:
        options["launch_pdl"] = config["launch_pdl"]
    grid = (-(-rows // block_m), -(-n_out // block_n), len(calls))
    launch(conv_reduce_kernel, grid, args, options)
