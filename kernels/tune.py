"""Find the fastest configs on the GPU at hand and write them where `find_config` looks.

``python -m yolov7.kernels.tune --variant yolov7 --batch 1 32 --minutes 20`` takes the distinct
launches of the model's plans, the batches by turns, the most expensive of each first by counted
operations and bytes, tries every config of the search space whose tiles fit, and writes
``configs/DEVICE/conv.json`` after each launch, so that a run that was cut goes on where it stopped.
Every config is compared with the fp32 reference before it is timed: a config that is wrong is
reported and never written (see the traps in `yolov7.kernels.conv.gather`), and one that takes the
device down, and so the tuner, is left out when it is run again. A launch is captured in a CUDA
graph, since from the host it may take longer than on the device; times are CUDA events around
several replays, the L2 cache flushed between them, the median taken.
"""

import argparse
import itertools
import json
import os
import signal
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from yolov7.kernels import runtime
from yolov7.kernels.aot import workload
from yolov7.kernels.conv.cases import DTYPES, Calls, bound, call_name, chosen_config
from yolov7.kernels.conv.launcher import config_kind, config_size, fits_tma
from yolov7.kernels.conv.layer import FP8_MAX, ConvCall, conv_reference
from yolov7.kernels.conv.search import ordered_configs
from yolov7.kernels.conv.stem import StemCall, stem_kind, stem_reference, stem_size
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
EXACT_TOLERANCE = 1e-4
"""Likewise of exact fp32: less than TF32 makes, which rounds each factor by up to 2^-11 of it."""


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
    """Why a config is not to be used, or None: it does not compile, or it is wrong.

    Raises:
        torch.AcceleratorError: it took the device down, where this process can do no more.
    """
    for call in members(calls):
        call.out.fill_(float("nan"))
    failed = None
    try:
        bound(calls, config)()
    except torch.AcceleratorError:
        raise
    except Exception as error:  # whatever the compiler throws makes this config unusable
        failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if torch.cuda.is_available():  # what Triton threw may have been a lost device
        torch.cuda.synchronize()
    if failed is not None:
        return failed
    for call, wanted in zip(members(calls), expected, strict=True):
        error_found = relative_error(call.out.float() * call.layer.out_scale, wanted)
        limit = EXACT_TOLERANCE if call.exact else TOLERANCE[call.out.dtype]
        if error_found > limit:
            return f"relative error {error_found:.2g} over {limit:.2g}"
    return None


def time_config(run: Callable[[], None], flush: Tensor, repeats: int = 20) -> float:
    """Median seconds of a launch from a cold cache; it has run, since no capture can compile."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    pairs = []
    for _ in range(repeats + 3):
        flush.zero_()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        pairs.append((start, end))
    torch.cuda.synchronize()
    return statistics.median(s.elapsed_time(e) for s, e in pairs[3:]) / 1000


class Trials:
    """The config that is being tried, noted in a file, and those that earlier processes ended in.

    A kernel that fails leaves no context to go on in. What the file names when it is opened was
    never done with.

    Args:
        path: of the file; there is none while it would be empty.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fatal = json.loads(path.read_text())["fatal"] if path.exists() else []

    def left(self, calls: Calls, configs: Iterable[Config]) -> list[Config]:
        """The configs of a launch that no process ended in."""
        return [config for config in configs if _trial(calls, config) not in self._fatal]

    @contextmanager
    def note(self, calls: Calls, config: Config) -> Iterator[None]:
        """Name the config in the file; it stays there where the body fails, or never ends."""
        _write_json(self._path, {"fatal": [*self._fatal, _trial(calls, config)]})
        try:
            yield
        except (KeyboardInterrupt, SystemExit):  # stopped, which is not the config's doing
            self._clear()
            raise
        self._clear()

    def _clear(self) -> None:
        """Name only those that earlier processes ended in."""
        if self._fatal:
            _write_json(self._path, {"fatal": self._fatal})
        else:
            self._path.unlink()


def _trial(calls: Calls, config: Config) -> list[Any]:
    """A config of a launch as JSON gives it back."""
    kind, size = launch_key(calls)
    return [kind, list(size), dict(config)]


def tune_launch(
    calls: Calls,
    configs: Iterable[Config],
    timer: Callable[[Callable[[], None]], float],
    *,
    attempt: Callable[[Config], AbstractContextManager[object]] = nullcontext,
    deadline: float = float("inf"),
    report: Callable[[str], None] = print,
) -> Entry | None:
    """The fastest right config of a launch.

    Args:
        calls: its layers with random content.
        configs: what to try, likely ones first.
        timer: seconds of a launch.
        attempt: entered while a config is tried.
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
        with attempt(config):
            wrong = check_config(calls, expected, config)
            seconds = timer(bound(calls, config)) if wrong is None else float("inf")
        if wrong is not None:
            report(f"  rejected {config}: {wrong}")
        elif best is None or seconds < best[0]:
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
    """Write a config file."""
    rows = [asdict(entry) for entry in sorted(entries, key=lambda entry: entry.key)]
    head = {"device": device, "capability": list(capability), "triton": triton.__version__}
    _write_json(path, {**head, "entries": rows})


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file whole, then rename it into place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=1) + "\n")
    os.replace(temporary, path)


def shipped_configs(calls: Calls) -> dict[str, Config]:
    """The default config and what was tuned for the launch's kind at any size, each once."""
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


def launches_to_tune(*plans: Iterable[Calls]) -> list[Calls]:
    """The distinct launches of some plans, which take turns, the most expensive of each first.

    What costs most costs it at the largest batch: without turns a run that is cut knows that alone.
    """
    distinct = ({launch_key(calls): calls for calls in plan}.values() for plan in plans)
    queues = (sorted(launches, key=expected_seconds, reverse=True) for launches in distinct)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return list({launch_key(calls): calls for calls in turns if calls is not None}.values())


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
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a config is left in good order
    return _tune_device(options)


def _tune_device(options: argparse.Namespace) -> int:  # pragma: no cover - needs a GPU
    device = torch.device("cuda")
    capability = torch.cuda.get_device_capability(device)
    folder = runtime.device_folder(device)
    assert folder is not None
    path = runtime.CONFIGS / folder / "conv.json"
    entries, trials = load_entries(path), Trials(path.with_name("trials.json"))
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    deadline = time.monotonic() + 60 * options.minutes
    plans = (workload(options.variant, n, options.precision)["calls"] for n in options.batch)
    for described in launches_to_tune(*plans):
        if time.monotonic() > deadline:
            print("out of time; run again to go on")
            break
        calls = random_calls(described, device)
        configs = trials.left(calls, ordered_configs(calls, capability))
        known = entries.get(launch_key(calls))
        if known is not None and known.tried >= len(configs):
            continue
        timer = partial(time_config, flush=flush)
        attempt = partial(trials.note, calls)
        best = tune_launch(calls, configs, timer, attempt=attempt, deadline=deadline)
        if best is not None:
            entries[best.key] = best
            write_entries(path, entries.values(), capability, folder)
            share = expected_seconds(calls) * 1e6 / best.microseconds
            print(f"{call_name(calls)}: {best.microseconds} us, {share:.0%} of the roofline")
    return 0


if __name__ == "__main__":
    sys.exit(main())
