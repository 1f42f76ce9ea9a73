"""What a launch of convolutions is expected to take: what configs are chosen by without a GPU.

A program's step brings a block of both operands from the L2 cache to shared memory and multiplies
them. Counted are, for the busiest processor: multiply-adds, bytes through shared memory, bytes from
the L2 cache, the instructions of a gather's addresses, those of the epilogue; and for the whole
device the traffic of the L2 cache and of memory, and what each launch costs that depends on the one
before. A processor's programs overlap: the longest of those shares bounds a step, unless one
program's own chain of waits is longer.

What no data sheet says is an interval (`yolov7.kernels.architectures`), and the ends of the
intervals make `corners`. A time is a range over them, and a config is chosen for the least regret:
its time over the best config's, in the corner where that is largest. No GPU has calibrated
this.
"""

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch

from yolov7.kernels.architectures import ARCHITECTURES, UNKNOWN
from yolov7.kernels.conv.config import ConvConfig
from yolov7.kernels.conv.launcher import tiles
from yolov7.kernels.conv.layer import ConvCall
from yolov7.kernels.conv.stem import StemCall
from yolov7.kernels.runtime import capability, processors, shared_bytes

STEP = 160.0, 320.0
"""Cycles that one program waits for at a step of its pipeline, whatever it computes."""
LATENCY = 600.0
"""Cycles until what is asked for is in shared memory; a pipeline's stages wait for it together."""
LAUNCH = 1.3e-6, 2.5e-6
"""Seconds that a launch costs that depends on the one before, in a CUDA graph."""
SHARED = 128  # bytes that a processor's shared memory moves in a cycle
LOADS = 64  # bytes that a processor takes from the L2 cache in a cycle at the most
ISSUE = 128  # operations on 32 bits in a cycle
SPECIAL = 16  # tanh, and what else the special function units compute
EPILOGUE = 10  # operations of an element
CACHED = 32 << 20  # bytes of maps that the L2 cache keeps from one launch to the next
REGISTERS = 64 << 10


class Corner(NamedTuple):
    """A GPU as it might be."""

    clock: float
    """Hz."""
    l2: float
    """Bytes per second from the L2 cache."""
    memory: float
    """Bytes per second from memory."""
    step: float
    """As `STEP`."""
    launch: float
    """As `LAUNCH`."""


def corners(device: torch.device) -> list[Corner]:
    """What a GPU may be, from its architecture."""
    a = ARCHITECTURES.get(capability(device), UNKNOWN)
    ends = itertools.product(zip(a.l2, a.memory, strict=True), STEP, LAUNCH)
    return [Corner(a.clock, l2, memory, step, launch) for (l2, memory), step, launch in ends]


def _products(call: ConvCall, capability: tuple[int, int]) -> float:
    """Multiply-adds of a processor in a cycle."""
    if call.exact:
        return ISSUE
    half = ARCHITECTURES.get(capability, UNKNOWN).products
    return half * 2 / call.x.element_size()


def timed(calls: Sequence[ConvCall], config: ConvConfig) -> Callable[[Corner], float]:
    """Seconds of a launch under a config, by the corner; two launches where its sum is split.

    What does not depend on the corner is counted once.
    """
    device = calls[0].x.device
    major, units = capability(device)[0], processors(device)
    m, n, k, split = config.block_m, config.block_n, config.block_k, config.split_k
    size, warps = calls[0].x.element_size(), config.num_warps
    each = [tiles([c], m, n) * split for c in calls]
    count = max(1, sum(each))
    deep = [-(-c.layer.taps * -(-c.layer.in_channels // k) // split) for c in calls]
    loaded = [((4 if c.layer.pool else 1) * m + n) * k * size for c in calls]
    total_steps = sum(t * s for t, s in zip(each, deep, strict=True))
    total_loaded = sum(t * s * b for t, s, b in zip(each, deep, loaded, strict=True))
    steps, stage = total_steps / count, total_loaded / max(1, total_steps)

    # A step of one program. Warp groups read A once for 256 columns, B once for 64 rows (128 on
    # Blackwell); elsewhere warps form a grid, each of which reads what its own part needs.
    groups = major in (9, 10, 11)
    a_reads = max(1, n / 256) if groups else 2
    b_reads = max(1, m / (64 if major == 9 else 128)) if groups else warps / 2
    multiplying = m * max(n, 16) * k / _products(calls[0], capability(device))
    through = (m * k * a_reads + n * k * b_reads) * size + stage
    gathering = 0.0 if config.tma else stage / 16 * 6 / ISSUE + 40
    through = max(multiplying, through / SHARED, gathering)

    # Programs that a processor holds.
    summed = m * n // (32 * warps)  # registers of a thread, counted on sm_90 beside the others
    registers = config.maxnreg or min(255, summed + 60 if config.tma else 2 * summed)
    by_registers = REGISTERS // (32 * warps * registers)
    by_memory = shared_bytes(device) // max(1, config.num_stages * (m + n) * k * size)
    held = max(1, min(by_registers, by_memory, config.occupancy if config.tma else 4))
    busiest = -(-count // units)
    full, rest = divmod(busiest, held)

    element = m * n
    finishing = element * 2 / ISSUE if split > 1 else element * max(EPILOGUE / ISSUE, 1 / SPECIAL)
    rows = [c.layer.compute.rows for c in calls]
    partials = 4 * split * sum(r * c.layer.out_channels for r, c in zip(rows, calls, strict=True))
    maps = sum(t.numel() * t.element_size() for c in calls for t in (c.x, c.out))
    weights = sum(c.weight.numel() * size for c in calls)
    slower = 1.0 if config.tma else 1.4  # of a step's waits: a gather's addresses come before
    waiting = LATENCY / max(1, config.num_stages - 1)

    def seconds(at: Corner) -> float:
        share = min(LOADS, at.l2 / min(units, count) / at.clock)
        step = max(through, stage / share)
        leaving = max(finishing, (element * 4 / share) if split > 1 else 0.0) + 350

        def together(programs: int) -> float:
            """Cycles of programs that run at once: of them all, or of one's own chain."""
            alone = steps * max(step, at.step * slower, waiting) + leaving
            return max(alone, programs * steps * step + leaving, programs * finishing)

        if config.flatten:  # the next tile's loads come before this one's epilogue
            one = steps * max(step, at.step, waiting)
            cycles = 700 + max(one, leaving) * (busiest - 1) + one + leaving
        else:
            cycles = full * (700 + together(held)) + (700 + together(rest) if rest else 0)
        kept = maps <= CACHED
        moved = weights / at.memory + maps / (at.l2 if kept else at.memory)
        busy = max(
            cycles / at.clock, moved, (total_loaded + (partials if split > 1 else 0)) / at.l2
        )
        launch = at.launch * (1.0 if config.launch_pdl else 1.5)
        if split == 1:
            return launch + busy
        return 2 * launch + busy + 2 * partials / at.l2

    return seconds


def stem_timed(call: StemCall) -> Callable[[Corner], float]:
    """Seconds of the first convolution, by the corner.

    A gather's addresses bound it: 1.2 instructions of a warp for each row and term of the sum.
    """
    units = processors(call.out.device)
    cycles = call.layer.target.rows * call.weight.shape[1] * 1.2 * 32 / ISSUE / units
    moved = sum(t.numel() * t.element_size() for t in (call.images, call.out))

    def seconds(at: Corner) -> float:
        memory = at.l2 if moved <= CACHED else at.memory
        return at.launch + max(cycles / at.clock, moved / memory)

    return seconds


def copy_timed(moved: int) -> Callable[[Corner], float]:
    """Seconds of a launch that reads and writes so many bytes and computes nothing, likewise."""
    return lambda at: at.launch + moved / (at.l2 if moved <= CACHED else at.memory)


class Choice(NamedTuple):
    """A config, and what it is expected to take."""

    config: ConvConfig
    seconds: tuple[float, ...]
    """In each corner."""
    regret: float
    """The largest ratio, over the corners, to the best config there."""


def ranked(calls: Sequence[ConvCall], configs: Iterable[ConvConfig]) -> list[Choice]:
    """Configs by their regret, the least first."""
    at = corners(calls[0].x.device)
    times = {config: tuple(map(timed(calls, config), at)) for config in configs}
    best = [min(column) for column in zip(*times.values(), strict=True)]
    choices = [
        Choice(config, row, max(t / b for t, b in zip(row, best, strict=True)))
        for config, row in times.items()
    ]
    return sorted(choices, key=lambda choice: choice.regret)
