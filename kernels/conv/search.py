"""Configs of the convolutions that are worth trying; see `yolov7.kernels.tune`."""

import itertools
from collections.abc import Iterator, Sequence

import triton

from yolov7.kernels.conv.cases import Calls
from yolov7.kernels.conv.launcher import default_config, fits_tma
from yolov7.kernels.conv.layer import ConvCall
from yolov7.kernels.conv.stem import StemCall, default_stem_config
from yolov7.kernels.runtime import Config

TILES = (
    *((64, 32), (64, 64), (64, 128)),
    *((128, 32), (128, 64), (128, 128), (128, 256)),
    *((256, 64), (256, 128)),
)
"""(BLOCK_M, BLOCK_N) of the search space."""


def ordered_configs(calls: Calls, capability: tuple[int, int]) -> list[Config]:
    """The search space of a launch, the default config before everything else."""
    if isinstance(calls, StemCall):
        default = default_stem_config(calls)
        space = stem_search_space(default)
    else:
        default, space = default_config(calls), search_space(calls, capability)
    return [default, *(config for config in space if config != default)]


def stem_search_space(default: Config) -> Iterator[Config]:
    """Rows and terms of the sum that a program takes at once."""
    for block_m, block_k, warps in itertools.product((32, 64, 128), (16, 32, 64), (4, 8)):
        yield {**default, "BLOCK_M": block_m, "BLOCK_K": block_k, "num_warps": warps}


def search_space(calls: Sequence[ConvCall], capability: tuple[int, int]) -> Iterator[Config]:
    """Configs worth trying: some 20 to 100, and machine code is shared by most launches.

    Tiles no wider than the layers; the deepest pipeline that fits shared memory and one less; the
    sum split as long as tiles leave processors idle; on the Hopper path one program a processor
    whose tiles overlap, or two that don't.
    """
    size, item = calls[0].x.element_size(), max(c.out.element_size() for c in calls)
    layers = [call.layer for call in calls]
    hopper = capability >= (9, 0)
    tma = hopper and fits_tma(calls)
    limit = (227 if hopper else 99) * 1024
    width = max(16, triton.next_power_of_2(max(x.out_channels for x in layers)))
    channels = triton.next_power_of_2(max(x.in_channels for x in layers))
    block_k = max(32 if size == 1 else 16, min(128 // size, channels))
    steps = max(x.taps * -(-x.in_channels // block_k) for x in layers)
    tiles = dict.fromkeys((m, min(n, width)) for m, n in TILES)
    for block_m, block_n in tiles:
        stage = (block_m + block_n) * block_k * size
        staged = block_m * block_n * item if tma else 0
        deepest = min(5, (limit - staged) // stage)
        depths = [stages for stages in (deepest, deepest - 1) if stages >= 2]
        if any(x.pool for x in layers):  # its loop has two stages, and loads four times the rows
            pooled = (4 * block_m + 2 * block_n) * block_k * size
            depths = [] if pooled > limit else depths if len(layers) > 1 else depths[:1]
        count = sum(-(-x.compute.rows // block_m) * -(-x.out_channels // block_n) for x in layers)
        splits = [s for s in (1, 2, 4, 8) if s == 1 or (steps >= 6 * s and count * s <= 528)]
        loops = ({"FLATTEN": 1, "OCCUPANCY": 1}, {"FLATTEN": 0, "OCCUPANCY": 2}) if tma else ({},)
        for stages, split, loop in itertools.product(depths, splits, loops):
            config = {
                "TMA": int(tma),
                "BLOCK_M": block_m,
                "BLOCK_N": block_n,
                "BLOCK_K": block_k,
                "SPLIT_K": split,
                "num_warps": 8 if block_m * block_n >= 128 * 128 else 4,
                "num_stages": stages,
                **loop,
            }
            yield config | ({"launch_pdl": 1} if hopper else {})
