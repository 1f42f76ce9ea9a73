"""Find the fastest configs on the GPU at hand and write them where `find_config` looks.

`tune_device` takes the distinct launches of some plans, by turns, the most expensive of each first
by counted operations and bytes, and writes ``configs/DEVICE/conv.json`` after each, so that a run
that was cut goes on where it stopped. Of a launch those configs are tried that the cost model
(`conv.model`) regrets least, compiled side by side before the first runs. Each is compared with the
fp32 reference before it is timed: one that is wrong is reported and never written (see the traps in
`yolov7.kernels.conv.gather`), one that takes the device down, and so the tuner, is left out when it
is run again, and 20 runs of the fastest have to agree bit for bit. A launch is timed as a network
meets it: in a CUDA graph, since from the host it may take longer than on the device, between others
of its kind, whose start it overlaps, with its maps in the L2 cache and its weights in memory.
"""

import itertools
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, fields, replace
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from yolov7.kernels import runtime
from yolov7.kernels.aot import compiled_kernel
from yolov7.kernels.conv import ConvConfig, ConvLaunch, Launch
from yolov7.kernels.conv.config import (
    Entry,
    read_entries,
    tuned_entries,
    user_configs,
    write_entries,
    write_json,
)
from yolov7.kernels.runtime import H200

TOLERANCE = {
    torch.float16: 1e-3,
    torch.bfloat16: 8e-3,
    torch.float32: 2e-3,
    torch.float8_e4m3fn: 4e-2,
    torch.int8: 8e-3,
}
"""Relative root mean square error that a right config stays below: the output's rounding."""
CANDIDATES = 8
"""Configs of a launch that are tried: of YOLOv7's 82 launches at batch 1 and 32 that is 652 trials
and 311 kernels to compile, where all would be 2982 and 942."""
CHAIN = 8
"""Launches that are timed together, the first of which finds nothing in the L2 cache."""
RUNS = 20
"""Of the fastest config, whose results must agree bit for bit."""
EXACT_TOLERANCE = 1e-4
"""Likewise of exact fp32: less than TF32 makes, which rounds each factor by up to 2^-11 of it."""


def expected_seconds(launch: Launch) -> float:
    """The roofline of a launch: counted operations or counted bytes, whichever takes longer."""
    flops = moved = 0
    for call in launch.calls:
        computed = call.layer.compute
        flops += 2 * computed.n * computed.h * computed.w * call.weight.numel()
        tensors = (getattr(call, field.name) for field in fields(call))
        moved += sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
    return H200.seconds(flops, moved)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Root mean square of the difference over that of the expected values; NaN counts as inf."""
    error = (actual.float() - expected).square().mean() / expected.square().mean()
    return float(error.sqrt().nan_to_num(nan=float("inf")))


def check_config(launch: Launch, expected: Sequence[Tensor], config: ConvConfig) -> str | None:
    """Why a config is not to be used, or None: it does not compile, or it is wrong.

    Raises:
        torch.AcceleratorError: it took the device down, where this process can do no more.
    """
    for call in launch.calls:
        call.out.fill_(float("nan"))
    failed = None
    try:
        launch.prepare(config)()
    except torch.AcceleratorError:
        raise
    except Exception as error:  # whatever the compiler throws makes this config unusable
        failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    if torch.cuda.is_available():  # what Triton threw may have been a lost device
        torch.cuda.synchronize()
    if failed is not None:
        return failed
    for call, wanted in zip(launch.calls, expected, strict=True):
        error_found = relative_error(call.out.float() * call.layer.out_scale, wanted)
        limit = EXACT_TOLERANCE if call.exact else TOLERANCE[call.out.dtype]
        if error_found > limit:
            return f"relative error {error_found:.2g} over {limit:.2g}"
    return None


def repeats_itself(launch: Launch, config: ConvConfig) -> bool:
    """Whether every run writes the same bits: one run may be right where programs race."""
    run = launch.prepare(config)
    first: list[Tensor] = []
    for _ in range(RUNS):
        for call in launch.calls:
            call.out.fill_(float("nan"))
        run()
        bits = [call.out.view(torch.uint8) for call in launch.calls]
        first = first or [b.clone() for b in bits]
        if not all(map(torch.equal, first, bits)):
            return False
    return True


def compile_configs(
    launch: Launch, configs: Iterable[ConvConfig], capability: tuple[int, int], threads: int
) -> int:
    """Compile what configs of a launch need, side by side, into the cache that launches look in.

    What does not compile is found out when it is tried.

    Args:
        launch: with tensors of ``device="meta"``.
        configs: of the launch.
        capability: of the GPU that will run it.
        threads: at a time; most of a compilation is LLVM and ptxas, which do not hold each other.

    Returns:
        How many kernels there are now.
    """
    specs: dict[str, runtime.CompileSpec] = {}
    for config in configs:
        with runtime.recording(capability) as found:
            launch.prepare(config)()
        specs |= {repr(replace(spec, fn=spec.fn.__name__)): spec for spec in found}

    def compiles(spec: runtime.CompileSpec) -> bool:
        try:
            compiled_kernel(spec, capability)
        except Exception:  # whatever the compiler throws
            return False
        return True

    with ThreadPoolExecutor(threads) as pool:
        done = list(pool.map(compiles, specs.values()))
    # Rarely, and for no reason that was found, what compiles alone does not beside others.
    return sum(ok or compiles(spec) for ok, spec in zip(done, specs.values(), strict=True))


def chain(launch: Launch, config: ConvConfig) -> list[Callable[[], None]]:
    """The launch again and again over the same maps, each time with other weights."""
    links = [launch]
    if isinstance(launch, ConvLaunch):  # the first layer's weights are a few kilobytes
        calls = launch.calls
        links += [
            ConvLaunch([replace(call, weight=call.weight.clone()) for call in calls])
            for _ in range(CHAIN - 1)
        ]
    return [link.prepare(config) for link in links]


def time_chain(runs: Sequence[Callable[[], None]], flush: Tensor, repeats: int = 20) -> float:
    """Median seconds of a launch in a chain; the first has run, since no capture can compile.

    Args:
        runs: the launches of the chain.
        flush: larger than the L2 cache, written before each replay: weights are then in memory.
        repeats: of the chain.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
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
    return statistics.median(s.elapsed_time(e) for s, e in pairs[3:]) / 1000 / len(runs)


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

    def left(self, launch: Launch, configs: Iterable[ConvConfig]) -> list[ConvConfig]:
        """The configs of a launch that no process ended in."""
        return [config for config in configs if _trial(launch, config) not in self._fatal]

    @contextmanager
    def note(self, launch: Launch, config: ConvConfig) -> Iterator[None]:
        """Name the config in the file; it stays there where the body fails, or never ends."""
        write_json(self._path, {"fatal": [*self._fatal, _trial(launch, config)]})
        try:
            yield
        except (KeyboardInterrupt, SystemExit):  # stopped, which is not the config's doing
            self._clear()
            raise
        self._clear()

    def _clear(self) -> None:
        """Name only those that earlier processes ended in."""
        if self._fatal:
            write_json(self._path, {"fatal": self._fatal})
        else:
            self._path.unlink()


def _trial(launch: Launch, config: ConvConfig) -> list[Any]:
    """A config of a launch as JSON gives it back."""
    kind, size = launch.key
    return [kind, list(size), asdict(config)]


def tune_launch(
    launch: Launch,
    configs: Iterable[ConvConfig],
    timer: Callable[[Sequence[Callable[[], None]]], float],
    *,
    attempt: Callable[[ConvConfig], AbstractContextManager[object]] = nullcontext,
    deadline: float = float("inf"),
    report: Callable[[str], None] = print,
) -> Entry | None:
    """The fastest right config of a launch.

    Args:
        launch: with random content.
        configs: what to try, likely ones first.
        timer: seconds of a launch in a chain of them.
        attempt: entered while a config is tried.
        deadline: `time.monotonic` after which no further config is tried.
        report: told about every config that is wrong.

    Returns:
        The best entry whose results repeat bit for bit; None when no config was tried or right.
    """
    expected = launch.reference()
    right: list[tuple[float, ConvConfig]] = []
    tried = 0
    for config in configs:
        if time.monotonic() > deadline:
            break
        tried += 1
        with attempt(config):
            wrong = check_config(launch, expected, config)
            seconds = timer(chain(launch, config)) if wrong is None else float("inf")
        if wrong is not None:
            report(f"  rejected {config}: {wrong}")
        else:
            right.append((seconds, config))
    for seconds, config in sorted(right, key=itemgetter(0)):
        with attempt(config):
            steady = repeats_itself(launch, config)
        if steady:
            return Entry(*launch.key, config, round(seconds * 1e6, 2), tried)
        report(f"  rejected {config}: its results differ from run to run")
    return None


def shipped_configs(launch: Launch) -> dict[str, ConvConfig]:
    """The chosen config, the default, and what was tuned for the kind at any size, each once."""
    found = {"chosen": launch.chosen(), "default": launch.configs()[0]}
    folder = runtime.device_folder(launch.calls[0].out.device)
    for entry in tuned_entries(folder).values() if folder else ():
        if entry.kind == launch.key[0] and launch.takes(entry.config):
            found[f"of {'x'.join(map(str, entry.size))}"] = entry.config
    names = {config: name for name, config in reversed(found.items())}
    return {name: config for name, config in found.items() if name == names[config]}


def launches_to_tune(*plans: Iterable[Launch]) -> list[Launch]:
    """The distinct launches of some plans, which take turns, the most expensive of each first.

    What costs most costs it at the largest batch: without turns a run that is cut knows that alone.
    """
    distinct = ({launch.key: launch for launch in plan}.values() for plan in plans)
    queues = (sorted(launches, key=expected_seconds, reverse=True) for launches in distinct)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*queues))
    return list({launch.key: launch for launch in turns if launch is not None}.values())


def tune_device(
    plans: Iterable[Iterable[Launch]], device: torch.device, deadline: float
) -> Iterator[tuple[Launch, Entry]]:  # pragma: no cover - needs a GPU
    """Tune what plans launch, as far as time goes; every entry is on disk when it is yielded.

    Args:
        plans: their launches.
        device: a CUDA device.
        deadline: `time.monotonic` after which no further config is tried.
    """
    folder = runtime.device_folder(device)
    assert folder is not None
    path = user_configs() / folder / "conv.json"
    entries, trials = read_entries(path), Trials(path.with_name("trials.json"))
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
    for described in launches_to_tune(*plans):
        if time.monotonic() > deadline:
            return
        launch = described.random(device)
        configs = trials.left(launch, launch.configs()[:CANDIDATES])
        known = entries.get(launch.key)
        if known is not None and known.tried >= len(configs):
            continue
        compile_configs(described, configs, runtime.capability(device), os.cpu_count() or 1)
        timer = partial(time_chain, flush=flush)
        attempt = partial(trials.note, launch)
        best = tune_launch(launch, configs, timer, attempt=attempt, deadline=deadline)
        if best is not None:
            entries[best.key] = best
            write_entries(path, entries, runtime.capability(device), folder)
            yield launch, best
