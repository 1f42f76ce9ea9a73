"""Find the fastest configs on the GPU at hand and write them where `find_config` looks.

``python -m yolov7.kernels.tune --variant yolov7 --batch 1 32 --minutes 20`` takes the distinct
launches of the model's plans, the most expensive first by counted operations and bytes, tries every
config of the search space whose tiles fit, and writes ``configs/DEVICE/conv.json`` after each
launch, so that a run that was cut goes on where it stopped. Every config is compared with the
fp32 reference before it is timed: a config that is wrong is reported and never written (see the
traps in `yolov7.kernels.conv.gather`). Times are CUDA events around several launches, the L2 cache
flushed between them, the median taken.
"""

import argparse
import itertools
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import triton
from torch import Tensor

from yolov7.kernels import runtime
from yolov7.kernels.aot import workload
from yolov7.kernels.conv.cases import DTYPES, Calls, bound, call_name, chosen_config
from yolov7.kernels.conv.launcher import config_kind, config_size, default_config, fits_tma
from yolov7.kernels.conv.layer import FP8_MAX, ConvCall, conv_reference
from yolov7.kernels.conv.stem import (
    StemCall,
    default_stem_config,
    stem_kind,
    stem_reference,
    stem_size,
)
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.runtime import Config

BANDWIDTH = 4.3e12
"""Bytes a second, for the order of the launches only."""
RATE = 7.9e14
"""Operations a second, likewise."""
TOLERANCE = {
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float32: 2e-3,
    torch.float8_e4m3fn: 4e-2,
}
"""Relative root mean square error that a right config stays below: the output's rounding."""
TILES = (
    *((64, 32), (64, 64), (64, 128)),
    *((128, 32), (128, 64), (128, 128), (128, 256)),
    *((256, 64), (256, 128)),
)
"""(BLOCK_M, BLOCK_N) of the search space."""


@dataclass(frozen=True)
class Entry:
    """One line of the JSON file: the best config of one launch."""

    kind: str
    size: tuple[int, ...]
    config: dict[str, int]
    microseconds: float
    tried: int
    """Configs that were tried; fewer than the search space when time ran out."""

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What a launch is looked up by."""
        return self.kind, self.size


def members(calls: Calls) -> Sequence[ConvCall | StemCall]:
    """The layers of a launch."""
    return [calls] if isinstance(calls, StemCall) else calls


def launch_key(calls: Calls) -> tuple[str, tuple[int, ...]]:
    """What the configs of a launch are looked up by."""
    if isinstance(calls, StemCall):
        return stem_kind(calls), stem_size(calls)
    return config_kind(calls), config_size(calls)


def references(calls: Calls) -> list[Tensor]:
    """What each layer of a launch is to write, in fp32."""
    if isinstance(calls, StemCall):
        return [stem_reference(calls)]
    return [conv_reference(call) for call in calls]


def expected_seconds(calls: Calls) -> float:
    """The roofline of a launch: counted operations or counted bytes, whichever takes longer."""
    flops = moved = 0
    for call in members(calls):
        computed = call.layer.compute
        flops += 2 * computed.n * computed.h * computed.w * call.weight.numel()
        tensors = (getattr(call, field.name) for field in fields(call))
        moved += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    return max(flops / RATE, moved / BANDWIDTH)


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


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values; NaN counts as inf."""
    error = (actual.float() - expected).square().mean() / expected.square().mean()
    return float(error.sqrt().nan_to_num(nan=float("inf")))


def _own(tensor: Tensor, device: torch.device) -> Tensor:
    """Uninitialised memory of the same shape, strides and alignment."""
    offset = tensor.storage_offset() % 16
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    elements = offset + 1 + sum((n - 1) * stride for n, stride in pairs)
    memory = torch.empty(elements, dtype=tensor.dtype, device=device)
    return memory.as_strided(tensor.shape, tensor.stride(), offset)


def _random_map(layout: PitchedLayout, tensor: Tensor, device: torch.device) -> Tensor:
    matrix = _own(tensor, device).zero_()
    pixels = layout.image_view(matrix)
    pixels.copy_(torch.randn(pixels.shape, device=device))
    return matrix


def random_call(call: ConvCall, device: torch.device) -> ConvCall:
    """The call with memory of its own and random content, outputs O(1)."""
    weight = torch.randn(call.weight.shape, device=device) * call.layer.length**-0.5
    scale, residual = call.scale, call.residual
    if scale is not None:
        weight, largest = weight / weight.abs().max() * FP8_MAX, weight.abs().max()
        scale = _own(scale, device).fill_(float(largest) / FP8_MAX)
    if residual is not None:
        residual = _random_map(call.layer.target, residual, device)
    return replace(
        call,
        x=_random_map(call.layer.source, call.x, device),
        weight=weight.to(call.weight.dtype),
        bias=_own(call.bias, device).normal_(),
        out=_own(call.out, device),
        scale=scale,
        residual=residual,
    )


def random_calls(calls: Calls, device: torch.device) -> Calls:
    """The launch with memory of its own and random content, outputs O(1)."""
    if not isinstance(calls, StemCall):
        return [random_call(call, device) for call in calls]
    return replace(
        calls,
        images=_own(calls.images, device).uniform_(),
        weight=_own(calls.weight, device).normal_(std=calls.weight.shape[1] ** -0.5),
        bias=_own(calls.bias, device).normal_(),
        out=_own(calls.out, device),
    )


def check_config(calls: Calls, expected: Sequence[Tensor], config: Config) -> str | None:
    """Why a config is not to be used, or None: it does not compile, or it is wrong."""
    for call in members(calls):
        call.out.fill_(float("nan"))
    try:
        bound(calls, config)()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler throws makes this config unusable
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    for call, wanted in zip(members(calls), expected, strict=True):
        error_found = relative_error(call.out.float() * call.layer.out_scale, wanted)
        limit = TOLERANCE[call.out.dtype]
        if error_found > limit:
            return f"relative error {error_found:.2g} over {limit:.2g}"
    return None


def time_config(
    run: Callable[[], None], flush: Tensor, repeats: int = 20
) -> float:  # pragma: no cover - needs a GPU
    """Median seconds of a launch, the L2 cache flushed before each."""
    pairs = []
    for _ in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(s.elapsed_time(e) for s, e in pairs[3:]) / 1000


def tune_launch(
    calls: Calls,
    configs: Iterable[Config],
    timer: Callable[[Callable[[], None]], float],
    *,
    deadline: float = float("inf"),
    report: Callable[[str], None] = print,
) -> Entry | None:
    """The fastest right config of a launch.

    Args:
        calls: its layers with random content.
        configs: what to try, likely ones first.
        timer: seconds of a launch.
        deadline: `time.monotonic` after which no further config is tried.
        report: told about every config that is wrong.

    Returns:
        The best entry; None when no config was tried or none was right.
    """
    expected = references(calls)
    best: tuple[float, Config] | None = None
    tried = 0
    for config in configs:
        if time.monotonic() > deadline:
            break
        tried += 1
        wrong = check_config(calls, expected, config)
        if wrong is not None:
            report(f"  rejected {config}: {wrong}")
            continue
        seconds = timer(bound(calls, config))
        if best is None or seconds < best[0]:
            best = seconds, config
    if best is None:
        return None
    return Entry(*launch_key(calls), dict(best[1]), round(best[0] * 1e6, 2), tried)


def load_entries(path: Path) -> dict[tuple[str, tuple[int, ...]], Entry]:
    """The entries of a config file, empty where there is none."""
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())["entries"]
    entries = [Entry(**{**row, "size": tuple(row["size"])}) for row in rows]
    return {entry.key: entry for entry in entries}


def write_entries(
    path: Path, entries: Iterable[Entry], capability: tuple[int, int], device: str
) -> None:
    """Write a config file whole, then rename it into place."""
    rows = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.key)]
    head = {"device": device, "capability": list(capability), "triton": triton.__version__}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**head, "entries": rows}, indent=1) + "\n")
    os.replace(temporary, path)


def shipped_configs(calls: Calls) -> dict[str, Config]:
    """What a launch may come to run with on its device: by origin, each config once."""
    device, (kind, _) = members(calls)[0].out.device, launch_key(calls)
    default = ordered_configs(calls, runtime.capability(device))[0]
    found = {"chosen": chosen_config(calls), "default": default}
    path = runtime.CONFIGS / str(runtime.device_folder(device)) / "conv.json"
    for entry in load_entries(path).values():
        fits = isinstance(calls, StemCall) or not entry.config["TMA"] or fits_tma(calls)
        if entry.kind == kind and fits:
            found[f"of {'x'.join(map(str, entry.size))}"] = entry.config
    distinct = {tuple(sorted(config.items())): name for name, config in reversed(found.items())}
    return {name: config for name, config in found.items() if name in distinct.values()}


def launches_to_tune(launches: Iterable[Calls]) -> list[Calls]:
    """The distinct launches of some plans, the most expensive first."""
    distinct = {launch_key(calls): calls for calls in launches}
    return sorted(distinct.values(), key=expected_seconds, reverse=True)


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune until done or out of time; 1 without a GPU."""
    parser = argparse.ArgumentParser(prog="python -m yolov7.kernels.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--variant", default="yolov7", help="model whose layers are tuned")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32], help="images")
    parser.add_argument("--precision", default="fp16", choices=DTYPES)
    parser.add_argument("--minutes", type=float, default=20.0, help="stop after this long")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("error: tuning needs a CUDA device", file=sys.stderr)
        return 1
    return _tune_device(options)


def _tune_device(options: argparse.Namespace) -> int:  # pragma: no cover - needs a GPU
    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability(device)
    folder = runtime.device_folder(device)
    assert folder is not None
    path = runtime.CONFIGS / folder / "conv.json"
    entries = load_entries(path)
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    deadline = time.monotonic() + 60 * options.minutes
    plans = (workload(options.variant, n, options.precision)["calls"] for n in options.batch)
    for described in launches_to_tune(itertools.chain(*plans)):
        if time.monotonic() > deadline:
            print("out of time; run again to go on")
            break
        calls = random_calls(described, device)
        configs = ordered_configs(calls, capability)
        known = entries.get(launch_key(calls))
        if known is not None and known.tried >= len(configs):
            continue
        best = tune_launch(calls, configs, lambda run: time_config(run, flush), deadline=deadline)
        if best is not None:
            entries[best.key] = best
            write_entries(path, entries.values(), capability, folder)
            share = expected_seconds(calls) * 1e6 / best.microseconds
            print(f"{call_name(calls)}: {best.microseconds} us, {share:.0%} of the roofline")
    return 0


if __name__ == "__main__":
    sys.exit(main())
