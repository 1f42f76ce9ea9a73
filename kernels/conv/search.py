"""Configs of a launch: the default one, from counted tiles, and those that are worth trying."""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from yolov7.kernels.conv.config import ConvConfig
from yolov7.kernels.conv.launcher import long_fp8_sum, tiles
from yolov7.kernels.conv.layer import ConvCall
from yolov7.kernels.conv.stem import StemCall
from yolov7.kernels.runtime import capability, processors, shared_bytes, triton

TILES = (
    *((64, 32), (64, 64), (64, 128)),
    *((128, 32), (128, 64), (128, 128), (128, 256)),
    *((256, 64), (256, 128)),
)
"""(block_m, block_n) of the search space."""


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
    """A config from counted tiles, for devices and sizes that nobody tuned.

    No choice spills registers or passes the shared memory of any target; that is held by the
    ahead-of-time tests.
    """
    device = calls[0].x.device
    units, limit = processors(device), _shared(calls)
    hopper = capability(device)[0] == 9
    tma = capability(device) >= (9, 0) and fits_tma(calls)
    block_m, block_n = _default_tile(calls, tma)
    block_k = _block_k(calls, tma)
    count = tiles(calls, block_m, block_n)
    steps = max(c.layer.taps * -(-c.layer.in_channels // block_k) for c in calls)
    # A second launch pays where it takes at least a dozen steps away from each program, and where
    # each processor has less to do then: of more tiles than half the processors some get two parts.
    split = max(1, min(2 * units // count, steps // 12, 8)) if 0 < 2 * count <= units else 1
    split = 1 << (split.bit_length() - 1)
    if not tma:
        return ConvConfig(
            block_m=block_m,
            block_n=block_n,
            block_k=block_k,
            split_k=split,
            num_warps=_gather_warps(calls, block_m, block_n),
            num_stages=2 if calls[0].exact else 4 if _roomy(calls) else 3,
            # Left alone, ptxas aims lower and spills a register or two of small tiles.
            maxnreg=168 if block_m * block_n <= 64 * 64 else 0,
            launch_pdl=capability(device) >= (9, 0),
        )
    stages = max(1, min(4, _depth(calls, block_m, block_n, block_k, limit)))
    large = block_m * block_n >= (128 * 128 if hopper else 128 * 64)
    occupancy = 1 if large or _depth(calls, block_m, block_n, block_k, limit // 2) < stages else 2
    # Overlapping one tile's store with the next one's loads takes registers and a second tile.
    several = count * split > units * occupancy
    return ConvConfig(
        tma=True,
        block_m=block_m,
        block_n=block_n,
        block_k=block_k,
        split_k=split,
        num_warps=8 if large else 4,
        num_stages=stages,
        # Left alone, ptxas spills to make room for a second program, which shared memory has not.
        maxnreg=255 if large and not hopper else 0,
        flatten=hopper and several and all(map(_plain_store, calls)),
        occupancy=occupancy,
        launch_pdl=True,
    )


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


def _default_tile(calls: Sequence[ConvCall], tma: bool) -> tuple[int, int]:
    """(block_m, block_n): the largest tile that keeps three quarters of the processors busy.

    What limits a large layer is the traffic from the L2 cache, (1 / block_m + 1 / block_n) per
    operation. Where no tile keeps them busy it is the smallest, and the sum may be split.
    """
    device = calls[0].x.device
    major, _ = capability(device)
    width = max(16, triton.next_power_of_2(max(c.layer.out_channels for c in calls)))
    if calls[0].exact:  # multiplied one by one: operands live in registers
        return 64, min(32, width)
    sizes = _TMA_TILES if tma else _GATHER_TILES[0 if major == 9 else 1 :]
    fitting = [(m, n) for m, n in sizes if n <= width] or [(64, width)]
    if not all(map(_plain_store, calls)) or long_fp8_sum(calls) or major != 9:  # larger ones spill
        wide = max(c.out.element_size() for c in calls) == 4
        largest = 64 * 64 if wide or (len(calls) > 1 and major < 9) else 128 * 128
        fitting = [(m, n) for m, n in fitting if m * n <= largest]
    if tma:
        block_k, room = _block_k(calls, tma), _shared(calls)
        deep = [(m, n) for m, n in fitting if _depth(calls, m, n, block_k, room) >= 3]
        fitting = deep or fitting[-1:]
    units = processors(device)
    filled = (tile for tile in fitting if _busy(tiles(calls, *tile), units) >= 0.75)
    return next(filled, fitting[-1])


_TMA_TILES = ((128, 256), (256, 128), (128, 128), (256, 64), (128, 64), (64, 64))
_GATHER_TILES = ((128, 128), (64, 128), (64, 64))  # the first where A stays in shared memory


def _plain_store(call: ConvCall) -> bool:
    """Whether the tile leaves through the small epilogue: 16 bits or less, nothing to add."""
    plain = call.residual is None and not call.layer.upsample
    return plain and call.out.dtype != torch.float32


def _gather_warps(calls: Sequence[ConvCall], block_m: int, block_n: int) -> int:
    return 8 if block_m * block_n >= 128 * 128 or _pools_bytes(calls) else 4


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


def _busy(tiles: int, units: int) -> float:
    """Share of the processors' time that this many equal tiles fill."""
    return tiles / (-(-tiles // units) * units) if tiles else 0.0


def search_space(calls: Sequence[ConvCall]) -> Iterator[ConvConfig]:
    """Configs worth trying: some 20 to 100, and machine code is shared by most launches.

    Tiles no wider than the layers; the deepest pipeline that fits shared memory and one less; the
    sum split as long as tiles leave processors idle; on the Hopper path one program a processor
    whose tiles overlap, or two that don't.
    """
    size, item = calls[0].x.element_size(), max(c.out.element_size() for c in calls)
    layers = [call.layer for call in calls]
    hopper = capability(calls[0].x.device) >= (9, 0)
    tma = hopper and fits_tma(calls)
    limit = shared_bytes(calls[0].x.device)
    width = max(16, triton.next_power_of_2(max(x.out_channels for x in layers)))
    channels = triton.next_power_of_2(max(x.in_channels for x in layers))
    block_k = max(32 if size == 1 else 16, min(128 // size, channels))
    steps = max(x.taps * -(-x.in_channels // block_k) for x in layers)
    loops = ((True, 1), (False, 2)) if tma else ((False, 1),)
    for block_m, block_n in dict.fromkeys((m, min(n, width)) for m, n in TILES):
        stage = (block_m + block_n) * block_k * size
        staged = block_m * block_n * item if tma else 0
        deepest = min(5, (limit - staged) // stage)
        depths = [stages for stages in (deepest, deepest - 1) if stages >= 2]
        if any(x.pool for x in layers):  # its loop has two stages, and loads four times the rows
            pooled = (4 * block_m + 2 * block_n) * block_k * size
            depths = [] if pooled > limit else depths if len(layers) > 1 else depths[:1]
        count = tiles(calls, block_m, block_n)
        splits = [s for s in (1, 2, 4, 8) if s == 1 or (steps >= 6 * s and count * s <= 528)]
        for stages, split, (flatten, occupancy) in itertools.product(depths, splits, loops):
            yield ConvConfig(
                tma=tma,
                block_m=block_m,
                block_n=block_n,
                block_k=block_k,
                split_k=split,
                num_warps=_gather_warps(calls, block_m, block_n),
                num_stages=stages,
                flatten=flatten,
                occupancy=occupancy,
                launch_pdl=hopper,
            )


def expected_cycles(calls: Sequence[ConvCall], config: ConvConfig) -> float:
    """About how long the busiest processor takes: what the tuner orders configs by, no more.

    The rates are an H100's and never were calibrated: 4096 bytes of products, 32 bytes from the L2
    cache and 128 operations of the epilogue a cycle (10 an element), 920 cycles of waiting that the
    stages of all programs of a processor share, 3300 for each launch that depends on another.
    """
    m, n, k, split = config.block_m, config.block_n, config.block_k, config.split_k
    size = calls[0].x.element_size()
    stage = (m + n) * k * size
    count = tiles(calls, m, n)
    each = -(-count * split // processors(calls[0].x.device))
    steps = sum(
        tiles([c], m, n) * c.layer.taps * -(-c.layer.in_channels // k) for c in calls
    ) / max(count, 1)
    fitting = max(1, _shared(calls) // (config.num_stages * stage))
    together = min(each, fitting, config.occupancy if config.tma else 4)
    step = max(m * n * k * size / 4096, stage / 32, 920 / (config.num_stages * max(together, 1)))
    epilogue = m * n * 10 / 128 + (m * n * 4 / 32 if split > 1 else 0)
    tile = -(-steps // split) * step
    tile = max(tile, epilogue) if config.flatten and each > 1 else tile + epilogue
    return each * tile + 3300 * (2 if split > 1 else 1)


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
