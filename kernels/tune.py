"""Find the fastest configs on the GPU at hand and write them where `find_config` looks.

``python -m yolov7.kernels.tune --variant yolov7 --batch 1 32 --minutes 20`` takes the model's
distinct convolutions, the most expensive first by counted operations and bytes, tries every
config of the search space whose tiles fit the layer, and writes ``configs/DEVICE/conv.json`` after
each layer, so that a run that was cut goes on where it stopped. Every config is compared with the
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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from yolov7.kernels import runtime
from yolov7.kernels.aot import workload
from yolov7.kernels.conv.cases import DTYPES, layer_key, layer_of, meta_call
from yolov7.kernels.conv.launcher import (
    config_kind,
    config_size,
    default_config,
    fits_tma,
    launch_conv,
    workspace_elements,
)
from yolov7.kernels.conv.layer import FP8_MAX, ConvCall, ConvLayer, conv_reference
from yolov7.kernels.runtime import Config

BANDWIDTH = 4.3e12
"""Bytes a second, for the order of the layers only."""
RATE = 7.9e14
"""Operations a second, likewise."""
TOLERANCE = {
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float32: 2e-3,
    torch.float8_e4m3fn: 4e-2,
}
"""Relative root mean square error that a right config stays below: the output's rounding."""


@dataclass(frozen=True)
class Entry:
    """One line of the JSON file: the best config of one layer."""

    kind: str
    size: tuple[int, ...]
    config: dict[str, int]
    microseconds: float
    tried: int
    """Configs that were tried; fewer than the search space when time ran out."""

    @property
    def key(self) -> tuple[str, tuple[int, ...]]:
        """What a layer is looked up by."""
        return self.kind, self.size


def expected_seconds(layer: ConvLayer, dtype: torch.dtype) -> float:
    """The roofline of a layer: counted operations or counted bytes, whichever takes longer."""
    maps = layer.source.rows * layer.in_channels + layer.target.rows * layer.out_channels
    weights = layer.taps * layer.in_channels * layer.out_channels
    return max(layer.flops / RATE, (maps + weights) * dtype.itemsize / BANDWIDTH)


TILES = (
    *((64, 32), (64, 64), (64, 128)),
    *((128, 32), (128, 64), (128, 128), (128, 256)),
    *((256, 64), (256, 128)),
)
"""(BLOCK_M, BLOCK_N) of the search space."""


def search_space(call: ConvCall, capability: tuple[int, int]) -> Iterator[dict[str, int]]:
    """Configs worth trying for a call: some 20 to 100, and machine code is shared by most layers.

    Tiles no wider than the layer; the deepest pipeline that fits shared memory and one less; the
    sum split as long as tiles leave processors idle; on the Hopper path one program a processor
    whose tiles overlap, or two that don't.
    """
    layer, size = call.layer, call.x.element_size()
    rows, n_out = layer.compute.rows, layer.out_channels
    hopper = capability >= (9, 0)
    tma = hopper and fits_tma([call])
    limit = (227 if hopper else 99) * 1024
    width = max(16, triton.next_power_of_2(n_out))
    smallest = 32 if size == 1 else 16
    block_k = max(smallest, min(128 // size, triton.next_power_of_2(layer.in_channels)))
    steps = layer.taps * -(-layer.in_channels // block_k)
    tiles = dict.fromkeys((m, min(n, width)) for m, n in TILES)
    for block_m, block_n in tiles:
        stage = (block_m + block_n) * block_k * size * (4 if layer.pool else 1)
        staged = block_m * block_n * call.out.element_size() if tma else 0
        deepest = min(5, (limit - staged) // stage)
        count = -(-rows // block_m) * -(-n_out // block_n)
        splits = [s for s in (1, 2, 4, 8) if s == 1 or (steps >= 6 * s and count * s <= 528)]
        loops = ({"FLATTEN": 1, "OCCUPANCY": 1}, {"FLATTEN": 0, "OCCUPANCY": 2}) if tma else ({},)
        for stages, split, loop in itertools.product((deepest, deepest - 1), splits, loops):
            if stages < 2:
                continue
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


def random_call(layer: ConvLayer, dtype: torch.dtype, device: torch.device) -> ConvCall:
    """A call with random content, outputs O(1)."""
    call = meta_call(layer, dtype, like=str(device))
    images = torch.randn(
        layer.source.n, layer.source.h, layer.source.w, layer.in_channels, device=device
    )
    call.x.zero_()
    layer.source.image_view(call.x).copy_(images.to(dtype))
    scale = (layer.taps * layer.in_channels) ** -0.5
    weight = torch.randn(call.weight.shape, device=device) * scale
    if call.scale is not None:
        weight, largest = weight / weight.abs().max() * FP8_MAX, weight.abs().max()
        call.scale.fill_(float(largest) / FP8_MAX)
    call.weight.copy_(weight.to(dtype))
    call.bias.normal_()
    return call


def check_config(call: ConvCall, expected: Tensor, config: Config, workspace: Tensor) -> str | None:
    """Why a config is not to be used, or None: it does not compile, or it is wrong."""
    call.out.fill_(float("nan"))
    try:
        launch_conv([call], config, workspace)
        if call.out.device.type == "cuda":
            torch.cuda.synchronize()
    except Exception as error:  # whatever the compiler throws makes this config unusable
        return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    error_found = relative_error(call.out.float() * call.layer.out_scale, expected)
    limit = TOLERANCE[call.out.dtype]
    return None if error_found <= limit else f"relative error {error_found:.2g} over {limit:.2g}"


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


def tune_layer(
    call: ConvCall,
    configs: Iterable[dict[str, int]],
    timer: Callable[[Callable[[], None]], float],
    *,
    deadline: float = float("inf"),
    report: Callable[[str], None] = print,
) -> Entry | None:
    """The fastest right config of a layer.

    Args:
        call: the layer with random content.
        configs: what to try, likely ones first.
        timer: seconds of a launch.
        deadline: `time.monotonic` after which no further config is tried.
        report: told about every config that is wrong.

    Returns:
        The best entry; None when no config was tried or none was right.
    """
    expected = conv_reference(call)
    key = config_kind([call]), config_size([call])
    best: tuple[float, dict[str, int]] | None = None
    tried = 0
    for config in configs:
        if time.monotonic() > deadline:
            break
        tried += 1
        workspace = torch.empty(workspace_elements([call], config), device=call.x.device)
        wrong = check_config(call, expected, config, workspace)
        if wrong is not None:
            report(f"  rejected {config}: {wrong}")
            continue

        def run(config: dict[str, int] = config, workspace: Tensor = workspace) -> None:
            launch_conv([call], config, workspace)

        seconds = timer(run)
        if best is None or seconds < best[0]:
            best = seconds, config
    if best is None:
        return None
    return Entry(*key, best[1], round(best[0] * 1e6, 2), tried)


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


def layers_to_tune(
    records: Iterable[Any], batches: Sequence[int], dtype: torch.dtype
) -> list[ConvLayer]:
    """The distinct layers of a model at some batch sizes, the most expensive first."""
    distinct = dict.fromkeys(layer_key(r) for r in records if r.in_channels not in (3, 12))
    layers = [layer_of(record, batch) for batch in batches for record in distinct]
    return sorted(layers, key=lambda layer: -expected_seconds(layer, dtype))


def ordered_configs(call: ConvCall, capability: tuple[int, int]) -> list[dict[str, int]]:
    """The search space, the default config before everything else."""
    default = dict(default_config([call]))
    return [default, *(c for c in search_space(call, capability) if c != default)]


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
    dtype = DTYPES[options.precision]
    records = workload(options.variant, 1, options.precision)["layers"]
    for layer in layers_to_tune(records, options.batch, dtype):
        described = meta_call(layer, dtype, like="cuda")
        configs = ordered_configs(described, capability)
        known = entries.get((config_kind([described]), config_size([described])))
        if known is not None and known.tried >= len(configs):
            continue
        if time.monotonic() > deadline:
            print("out of time; run again to go on")
            break
        call = random_call(layer, dtype, device)
        best = tune_layer(call, configs, lambda run: time_config(run, flush), deadline=deadline)
        if best is not None:
            entries[best.key] = best
            write_entries(path, entries.values(), capability, folder)
            share = expected_seconds(layer, dtype) * 1e6 / best.microseconds
            print(f"{layer.describe()}: {best.microseconds} us, {share:.0%} of the roofline")
    return 0


if __name__ == "__main__":
    sys.exit(main())
