"""Launch by launch on the device: is every config right, and how long does every step take?

``python -m bench.layers check FILE`` compares every distinct launch of convolutions of the whole
family's plans, in every type, at batch 1 and 32, with fp32: with the config that is looked up, the
default one, and every other one shipped for its kind. ``python -m bench.layers time FILE`` times
every step of YOLOv7's plan beside its roofline, and every stage of the engines.

Both append a JSON a line and skip what FILE has already, so that a run that was cut, or that a bad
kernel took down, goes on behind it.
"""

import argparse
import itertools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from bench.results import json_lines
from yolov7.benchmark.ceilings import Ceilings
from yolov7.benchmark.stages import measure
from yolov7.benchmark.steps import step_timers
from yolov7.engine.choose import Runtime
from yolov7.engine.graph.planned import PlannedNetwork, described
from yolov7.errors import first_line
from yolov7.kernels import runtime
from yolov7.kernels.conv import Launch
from yolov7.kernels.runtime import PRECISIONS
from yolov7.kernels.tune import check_config, shipped_configs
from yolov7.model import YOLOv7, create_model
from yolov7.variants import VARIANTS

BATCHES = (1, 32)
REPEATS = 30
ROUNDS = 300  # batches that an engine is timed for
FIRST = "yolov7"  # before the other variants

Entry = dict[str, Any]
Job = tuple[str, Callable[[], Entry]]


def family(*, small: bool) -> Iterator[YOLOv7]:
    """All variants on the meta device, YOLOv7 first; small: one of few and narrow layers."""
    with torch.device("meta"):
        if small:
            yield create_model("yolov7-tiny", 3, width=0.125).fuse()
            return
        for name in sorted(VARIANTS, key=lambda variant: variant != FIRST):
            yield create_model(name, form="deploy").fuse()


def check_jobs(device: torch.device, *, small: bool) -> Iterator[Job]:
    """A job for each launch, type and batch; YOLOv7 in fp16 comes first."""
    models = list(family(small=small))
    precisions = [
        name for name in PRECISIONS if name != "fp8" or runtime.capability(device) >= (8, 9)
    ]
    batches = (1, 2) if small else BATCHES
    seen: set[str] = set()
    for precision, batch, model in itertools.product(precisions, batches, models):
        size = 64 if small else model.imgsz
        for launch in described(model, batch, size, size, PRECISIONS[precision]):
            name = f"{launch.name} {launch.calls[0].layer.activation} in {precision}"
            if name not in seen:
                seen.add(name)
                yield name, partial(check, launch, device)


def check(layers: Launch, device: torch.device) -> Entry:
    """How many configs were compared, and which are wrong, why.

    Raises:
        torch.AcceleratorError: A config took the device down; its note says which.
    """
    launch = layers.random(device)
    expected = launch.reference()
    found: dict[str, str | None] = {}
    for origin, config in shipped_configs(launch).items():
        name = f"{origin} {config}"
        try:
            found[name] = check_config(launch, expected, config)
        except torch.AcceleratorError as error:
            error.add_note(name)
            raise
    return {"configs": len(found), "wrong": {name: why for name, why in found.items() if why}}


def time_jobs(device: torch.device, *, small: bool) -> Iterator[Job]:
    """A job for each step of YOLOv7's plan at batch 1 and 32, fp16."""
    ceilings = Ceilings(device, small=small)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    for batch in (1,) if small else BATCHES:
        model = create_model("yolov7-tiny", 3, width=0.125) if small else create_model(FIRST)
        model = model.fuse().requires_grad_(False).to(device)
        size = 64 if small else model.imgsz
        network = PlannedNetwork(model, batch, size, size, dtype=dtype, device=device)
        network.images.copy_(torch.rand(network.images.shape))
        network.run()
        if device.type == "cuda":
            torch.cuda.synchronize()  # what fails in here is not the first step's fault
        timers = step_timers(network, ceilings, 1 if small else REPEATS)
        for index, timer in enumerate(timers):
            yield f"batch {batch} step {index}", partial(_with_batch, batch, timer)
        for engine in ("graph", "eager"):
            rounds = 1 if small else ROUNDS
            yield (
                f"batch {batch} {engine}",
                partial(time_engine, model, engine, size, batch, rounds),
            )


def _with_batch(batch: int, timer: Callable[[], Entry]) -> Entry:
    return {"batch": batch, **timer()}


def time_engine(model: YOLOv7, engine: str, size: int, batch: int, rounds: int) -> Entry:
    """p50, p95 and p99 of the stages from a frame to its boxes, and totals."""
    timing = measure(Runtime(weights=model, engine=engine, imgsz=size), batch=batch, rounds=rounds)
    return {"batch": batch, "stages": timing.rows(), "totals": timing.totals()}


def read(file: Path) -> dict[str, Entry]:
    """What a file holds, by name."""
    return {entry.pop("name"): entry for entry in json_lines(file)}


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
            what = first_line(error)
            entry = {"wrong": {"error": ": ".join([*getattr(error, "__notes__", ()), what])}}
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
