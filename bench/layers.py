"""Layer by layer on the device: is every config right, and how long does every step take?

``python -m bench.layers check FILE`` compares the convolution of every distinct layer of the whole
family, in every type, at batch 1 and 32, with fp32: with the config that is looked up, the default
one, and every other one shipped for its kind. ``python -m bench.layers time FILE`` times every step
of YOLOv7's plan beside its roofline, and every stage of the engines.

Both append a JSON a line and skip what FILE has already, so that a run that was cut, or that a bad
kernel took down, goes on behind it.
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.ceilings import Ceilings
from bench.race import Run, captured
from yolov7.benchmark import measure
from yolov7.engine.network import PlannedNetwork
from yolov7.info import conv_layers
from yolov7.kernels import runtime
from yolov7.kernels.conv import (
    ConvCall,
    ConvLayer,
    choose_config,
    conv_reference,
    workspace_elements,
)
from yolov7.kernels.conv.cases import DTYPES, Record, layer_key, layer_of
from yolov7.kernels.conv.launcher import config_kind, default_config, fits_tma
from yolov7.kernels.runtime import Config
from yolov7.kernels.tune import check_config, load_entries, random_call
from yolov7.model import YOLOv7, create_model
from yolov7.variants import VARIANTS

BATCHES = (1, 32)
EXACT = "fp32 exact"  # as the layer's option says; else fp32 is multiplied as TF32
REPEATS = 30
ROUNDS = 300  # batches that an engine is timed for
FIRST = "yolov7"  # before the other variants

Entry = dict[str, Any]
Job = tuple[str, Callable[[], Entry]]


def family() -> list[Record]:
    """The distinct convolutions of all variants, YOLOv7's first, the stems apart."""
    records: dict[Record, None] = {}
    for name in sorted(VARIANTS, key=lambda variant: variant != FIRST):
        with torch.device("meta"):
            model = create_model(name, form="deploy").fuse()
        layers = conv_layers(model, model.imgsz, model.imgsz)
        records |= dict.fromkeys(layer_key(layer) for layer in layers)
    return [record for record in records if record.in_channels not in (3, 12)]


def shrunk(record: Record) -> Record:
    """A few pixels and channels of a layer, for the interpreter."""
    sides = min(record.height, 6), min(record.width, 6)
    channels = min(record.in_channels, 32), min(record.out_channels, 16)
    return Record(*channels, record.kernel, record.stride, *sides, record.activation)


def configs(call: ConvCall) -> dict[str, Config]:
    """What to check a call with: by origin, each config once."""
    found: dict[str, Config] = {"chosen": choose_config([call]), "default": default_config([call])}
    folder = runtime.device_folder(call.x.device)
    entries = load_entries(runtime.CONFIGS / str(folder) / "conv.json").values()
    kind = config_kind([call])
    for entry in entries:
        if entry.kind == kind and (not entry.config["TMA"] or fits_tma([call])):
            found[f"of {'x'.join(map(str, entry.size))}"] = entry.config
    distinct = {tuple(sorted(config.items())): name for name, config in reversed(found.items())}
    return {name: config for name, config in found.items() if name in distinct.values()}


def check_jobs(device: torch.device, *, small: bool) -> Iterator[Job]:
    """A job for each layer, type and batch; YOLOv7 in fp16 comes first."""
    records = list(dict.fromkeys(map(shrunk, family()))) if small else family()
    precisions = [name for name in DTYPES if name != "fp8" or runtime.capability(device) >= (8, 9)]
    precisions.append(EXACT)
    batches = (1, 2) if small else BATCHES
    for precision, batch, record in itertools.product(precisions, batches, records):
        layer = layer_of(record, batch, exact=precision == EXACT)
        name = f"{layer.describe()} {record.activation} {precision}"

        def job(layer: ConvLayer = layer, precision: str = precision) -> Entry:
            call = random_call(layer, DTYPES.get(precision, torch.float32), device)
            expected = conv_reference(call)
            wrong = {}
            for origin, config in configs(call).items():
                elements = workspace_elements([call], config)
                workspace = torch.empty(elements, device=device)
                if reason := check_config(call, expected, config, workspace):
                    wrong[f"{origin} {dict(config)}"] = reason
            return {"configs": len(configs(call)), "wrong": wrong}

        yield name, job


def time_jobs(device: torch.device, *, small: bool) -> Iterator[Job]:
    """A job for each step of YOLOv7's plan at batch 1 and 32, fp16."""
    ceilings = Ceilings(device, small=small)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    rate = ceilings.flops(dtype)
    for batch in (1,) if small else BATCHES:
        model = create_model("yolov7-tiny", 3, width=0.125) if small else create_model(FIRST)
        model = model.fuse().requires_grad_(False).to(device)
        size = 64 if small else model.imgsz
        network = PlannedNetwork(model, batch, size, size, dtype=dtype, device=device)
        plan = network.plan
        network.images.copy_(torch.rand(network.images.shape))
        network.run()
        runs: list[Run] = [*(run for _, run in network.launches()), network.decode]
        for index, (step, run) in enumerate(zip(plan.steps, runs, strict=True)):
            flops, moved = plan.step_flops(step), plan.step_bytes(step)
            moved += plan.step_weight_bytes(step)
            shape = "; ".join(task.describe() for task in step.tasks)

            def job(
                run: Run = run,
                flops: int = flops,
                moved: int = moved,
                kind: str = step.kind,
                batch: int = batch,
                shape: str = shape,
            ) -> Entry:
                replay = captured(run, device)
                times = [ceilings.clock(replay) for _ in range(1 if small else REPEATS)]
                seconds = statistics.median(times)
                floor = max(flops / rate, moved / ceilings.bandwidth)
                return {
                    "batch": batch,
                    "kind": kind,
                    "shape": shape,
                    "us": seconds * 1e6,
                    "roofline_us": floor * 1e6,
                    "tflops": flops / seconds / 1e12,
                    "gbps": moved / seconds / 1e9,
                }

            yield f"batch {batch} step {index}", job
        for engine in ("graph", "eager"):
            rounds = 1 if small else ROUNDS
            yield (
                f"batch {batch} {engine}",
                partial(time_engine, model, engine, size, batch, rounds),
            )


def time_engine(model: YOLOv7, engine: str, size: int, batch: int, rounds: int) -> Entry:
    """p50, p95 and p99 of the stages from a frame to its boxes, and totals."""
    timing = measure(model, engine=engine, imgsz=size, batch=batch, rounds=rounds)
    return {"batch": batch, "stages": timing.rows(), "totals": timing.totals()}


def read(file: Path) -> dict[str, Entry]:
    """What a file holds, by name; a line that was cut off is left out."""
    found = {}
    for line in file.read_text().splitlines() if file.exists() else ():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            break
        found[entry.pop("name")] = entry
    return found


def work_off(jobs: Iterator[Job], file: Path) -> int:
    """Do the jobs that a file lacks; what raises is noted as wrong, and ends the process.

    A kernel that fails on a GPU takes everything after it in the same process down.
    """
    done = read(file)
    for name, job in jobs:
        if name in done:
            continue
        try:
            entry = job()
        except Exception as error:  # whatever it is belongs to the report
            entry = {"wrong": {"error": f"{type(error).__name__}: {error}".splitlines()[0]}}
        with file.open("a") as lines:
            lines.write(json.dumps({"name": name, **entry}) + "\n")
        if "error" in entry.get("wrong", {}):
            return 1
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Check or time; 1 if a kernel failed in a way that the next process has to go on from."""
    parser = argparse.ArgumentParser(prog="python -m bench.layers", description=__doc__)
    parser.add_argument("what", choices=("check", "time"))
    parser.add_argument("file", type=Path)
    parser.add_argument("--small", action="store_true", help="toy layers, on a CPU too")
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu" and not options.small:
        parser.error("needs a GPU; --small does not")
    torch.backends.cudnn.allow_tf32 = False  # what is compared with is to be exact
    jobs = check_jobs if options.what == "check" else time_jobs
    with torch.no_grad():
        return work_off(jobs(device, small=options.small), options.file)


if __name__ == "__main__":
    sys.exit(main())
