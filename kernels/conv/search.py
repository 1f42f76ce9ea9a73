"""Configs of a launch: those that are worth trying, and the one that the cost model would take."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from yolov7.kernels.conv.config import ConvConfig
from yolov7.kernels.conv.launcher import long_fp8_sum
from yolov7.kernels.conv.layer import ConvCall
from yolov7.kernels.conv.model import ranked
from yolov7.kernels.conv.stem import StemCall
from yolov7.kernels.runtime import capability, shared_bytes, triton

_TMA_TILES = (
    *((128, 256), (256, 128), (128, 128), (256, 64), (64, 128)),
    *((128, 64), (64, 64), (128, 32), (64, 32)),
)
_GATHER_TILES = (
    *((128, 256), (256, 128), (128, 128), (256, 64)),  # where A stays in shared memory
    *((64, 128), (128, 64), (64, 64), (64, 32)),
)


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


def default_config(calls: Sequence[ConvCall]) -> ConvConfig:
    """The config that the cost model regrets least, for devices and sizes that nobody tuned."""
    return ranked(calls, search_space(calls))[0].config


def search_space(calls: Sequence[ConvCall]) -> Iterator[ConvConfig]:
    """Configs worth trying: some 10 to 60, and machine code is shared by most launches.

    None that the cost model may choose spills registers or passes the shared memory of any target;
    that is held by the ahead-of-time tests.
    """
    device = calls[0].x.device
    tma = capability(device) >= (9, 0) and fits_tma(calls)
    block_k = _block_k(calls, tma)
    steps = max(c.layer.taps * -(-c.layer.in_channels // block_k) for c in calls)
    splits = [split for split in (1, 2, 4, 8) if split == 1 or steps >= 6 * split]
    for (block_m, block_n), split in itertools.product(_tiles(calls, tma), splits):
        if tma:
            options = _tma_options(calls, block_m, block_n, block_k)
        else:
            options = _gather_options(calls, block_m, block_n)
        for values in options:
            yield ConvConfig(
                tma=tma, block_m=block_m, block_n=block_n, block_k=block_k, split_k=split, **values
            )


def _tiles(calls: Sequence[ConvCall], tma: bool) -> list[tuple[int, int]]:
    """(block_m, block_n), no wider than the layers, that registers hold."""
    major, _ = capability(calls[0].x.device)
    width = max(16, triton.next_power_of_2(max(c.layer.out_channels for c in calls)))
    if calls[0].exact:  # multiplied one by one: operands live in registers
        return [(64, min(32, width))]
    sizes = _TMA_TILES if tma else _GATHER_TILES[0 if major == 9 else 4 :]
    fitting = [(m, n) for m, n in sizes if n <= width] or [(64, width)]
    largest = _largest_tile(calls, major, tma)
    pooled = any(c.layer.pool for c in calls)
    fitting = [(m, n) for m, n in fitting if m * n <= largest and (m <= 128 or not pooled)]
    if tma:
        block_k, room = _block_k(calls, tma), _shared(calls)
        deep = [(m, n) for m, n in fitting if _depth(calls, m, n, block_k, room) >= 3]
        fitting = deep or fitting[-1:]
    return fitting


def _largest_tile(calls: Sequence[ConvCall], major: int, tma: bool) -> int:
    """Elements of the largest tile that spills no register."""
    if max(c.out.element_size() for c in calls) == 4 or (len(calls) > 1 and major < 9):
        return 64 * 64
    plain = all(map(_plain_store, calls))
    pooled = any(c.layer.pool for c in calls)
    masked = not tma and _masked(calls)
    if major == 9 and plain and not (pooled or masked or long_fp8_sum(calls)):
        return 128 * 256
    return 128 * 128 if plain or calls[0].x.element_size() > 1 else 64 * 128


def _gather_options(
    calls: Sequence[ConvCall], block_m: int, block_n: int
) -> Iterator[dict[str, Any]]:
    """What else a config of the portable path says."""
    heavy = calls[0].exact or any(c.layer.pool or c.layer.upsample for c in calls)
    heavy |= _masked(calls)
    deepest = 2 if calls[0].exact else 4 if _roomy(calls) else 3
    for stages in range(deepest, max(1, deepest - 2), -1):
        yield {
            "num_warps": _gather_warps(calls, block_m, block_n),
            "num_stages": stages,
            # Left alone, ptxas aims lower and spills a register or two.
            "maxnreg": 255 if heavy else 168 if block_m * block_n <= 64 * 64 else 0,
            "launch_pdl": capability(calls[0].x.device) >= (9, 0),
        }


def _tma_options(
    calls: Sequence[ConvCall], block_m: int, block_n: int, block_k: int
) -> Iterator[dict[str, Any]]:
    """What else a config of the Hopper path says: tiles that overlap, or two programs."""
    hopper = capability(calls[0].x.device)[0] == 9
    large = block_m * block_n >= (128 * 128 if hopper else 128 * 64)
    for flatten, occupancy in ((False, 1), (True, 1), (False, 2)):
        depth = _depth(calls, block_m, block_n, block_k, _shared(calls) // occupancy)
        if occupancy == 2 and (large or depth < 3):
            continue
        # Overlapping one tile's store with the next one's loads takes registers and a second tile.
        if flatten and not (hopper and all(map(_plain_store, calls))):
            continue
        yield {
            "num_warps": 8 if large else 4,
            "num_stages": max(1, min(4, depth)),
            # Left alone, ptxas spills to make room for programs that shared memory has none for.
            "maxnreg": 0 if hopper else 255,
            "flatten": flatten,
            "occupancy": occupancy,
            "launch_pdl": True,
        }


def _shared(calls: Sequence[ConvCall]) -> int:
    """Shared memory for operands and results: the pipeline's barriers and padding take the rest."""
    return shared_bytes(calls[0].x.device) - 3 * 1024


def _roomy(calls: Sequence[ConvCall]) -> bool:
    """Whether gathers have room for four stages of 128 bytes along the sum: sm_90, sm_100."""
    return _shared(calls) >= 200 * 1024


def _depth(calls: Sequence[ConvCall], block_m: int, block_n: int, block_k: int, room: int) -> int:
    """Stages of a pipeline of descriptor loads that fit so many bytes, beside the output's tile."""
    added = any(c.residual is not None for c in calls)
    staged = block_m * block_n * max(c.out.element_size() for c in calls) * (2 if added else 1)
    return max(0, room - staged) // ((block_m + block_n) * block_k * calls[0].x.element_size())


def _plain_store(call: ConvCall) -> bool:
    """Whether the tile leaves through the small epilogue: 16 bits or less, nothing to add."""
    plain = call.residual is None and not call.layer.upsample
    return plain and call.out.dtype != torch.float32


def _gather_warps(calls: Sequence[ConvCall], block_m: int, block_n: int) -> int:
    """More threads where a tile, its masks, or what is pooled in it, takes many registers."""
    large, masked = block_m * block_n > 64 * 64, _masked(calls)
    heavy = masked and (large or calls[0].x.dtype == torch.int8)
    if any(c.layer.pool for c in calls):
        narrow = calls[0].x.element_size() == 1
        heavy |= narrow or masked or block_m >= 128 or (large and not _roomy(calls))
    return 8 if heavy or block_m * block_n >= 128 * 128 else 4


def _masked(calls: Sequence[ConvCall]) -> bool:
    """Whether the last block along the sum reaches beyond the channels, so that loads are masked.

    That takes registers, of int8 one for each byte.
    """
    block_k = _block_k(calls, tma=False)
    return any(c.layer.in_channels % block_k for c in calls)


def _pools_bytes(calls: Sequence[ConvCall]) -> bool:
    """Whether int8 is pooled on load: each byte is unpacked into a register for it."""
    return any(c.layer.pool and c.x.dtype == torch.int8 for c in calls)


def _block_k(calls: Sequence[ConvCall], tma: bool) -> int:
    """128 bytes along the sum, the widest swizzle, or 64 where shared memory is scarce."""
    size = calls[0].x.element_size()
    if calls[0].exact:
        return 16
    roomy = tma or (_roomy(calls) and not _pools_bytes(calls))
    smallest = 32 if size == 1 else 16
    widest = triton.next_power_of_2(max(c.layer.in_channels for c in calls))
    return max(smallest, min((128 if roomy else 64) // size, widest))


def default_stem_config(call: StemCall) -> ConvConfig:
    """A config of the first convolution, for devices and sizes that nobody tuned.

    Of a 3x3 one in 16 bits a program takes as many rows as registers hold: what it computes of the
    taps serves all of them. For sm_90 640x640 -> 32 in fp16 compiles to 44 instructions of a warp
    for each row of the output at 64 rows, 38 at 128 and 31 at 256.
    """
    block_n = max(16, triton.next_power_of_2(call.out.shape[1]))
    if call.weight.element_size() == 4:  # twice the registers; exact operands live in them alone
        block_n = min(block_n, 32 if call.exact else 64)
    short = call.layer.kernel == 3 and call.weight.element_size() == 2
    return ConvConfig(
        block_m=max(64, 8192 // block_n) if short else 64,
        block_n=block_n,
        block_k=32,
        num_stages=1,
        launch_pdl=capability(call.out.device) >= (9, 0),
    )


def stem_search_space(call: StemCall) -> Iterator[ConvConfig]:
    """Rows and terms of the sum that a program of the first convolution takes at once."""
    default = default_stem_config(call)
    for block_m, block_k, warps in itertools.product((32, 64, 128), (16, 32, 64), (4, 8)):
        yield replace(default, block_m=block_m, block_k=block_k, num_warps=warps)
