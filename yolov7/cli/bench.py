"""The verb `yolov7 bench`: its options and what it prints; yolov7/benchmark/ measures."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from yolov7.benchmark.stages import Timing, measure, soak
from yolov7.checkpoint import load_model
from yolov7.cli.options import ModelOptions
from yolov7.detector import Detector
from yolov7.device import resolve_device
from yolov7.drawing import NO_PLOTS, can_plot
from yolov7.engine.choose import resolve_engine
from yolov7.errors import at_least_one
from yolov7.formats import is_exported
from yolov7.progress import progress
from yolov7.runs import check_writable, new_run, write_json


@dataclass(kw_only=True)
class Bench(ModelOptions):
    """Time a model from a 1080p frame to the boxes, stage by stage."""

    engines: tuple[str, ...] = ()
    """engines to compare (default: --engine, or with auto every one that makes sense here)"""
    batch: int = 1
    """images at a time"""
    rounds: int = 50
    """batches that are timed"""
    soak: float | None = None
    """instead, detect for so many seconds: tail, drift and growth of memory"""
    project: Path = Path("runs/bench")
    """folder of the run folders"""
    name: str | None = None
    """run folder (default: the next number)"""
    json: Path | None = None
    """write {"rows": [...], "totals": {...}} to this file"""


def run(options: Bench) -> int:
    """Measure, print, draw."""
    for name in ("batch", "rounds"):
        at_least_one(name, getattr(options, name))
    check_writable(options.json)
    result = _soak(options) if options.soak is not None else _compare(options)
    write_json(options.json, result)
    return 0


def _exported(options: Bench) -> bool:
    return options.weights is not None and is_exported(options.weights)


def _engines(options: Bench) -> list[str]:
    if options.engines:
        return list(options.engines)
    if _exported(options) or options.engine != "auto":
        return [options.engine]
    graph = resolve_engine("auto", resolve_device(options.device)) == "graph"
    return ["eager", "compile", *["graph"] * graph]


def _compare(options: Bench) -> dict[str, Any]:
    runtime = options.runtime()
    if not _exported(options):
        model = load_model(options.weights, variant=options.variant)
        runtime = replace(runtime, weights=model, variant=None)
    timings = [
        measure(replace(runtime, engine=engine), batch=options.batch, rounds=options.rounds)
        for engine in progress(_engines(options), "measuring", len(_engines(options)))
    ]
    _print(timings)
    _draw(options, timings)
    totals = [timing.totals() for timing in timings]
    return {"rows": [row for t in timings for row in t.rows()], "totals": {"engines": totals}}


def _soak(options: Bench) -> dict[str, Any]:
    assert options.soak is not None
    detector = Detector(**vars(options.runtime()), batch=options.batch)
    row = soak(detector, options.soak)
    grown = row["growth_bytes"]
    memory = "growth of memory unknown" if grown is None else f"memory grew by {_mib(grown, 1)}"
    print(
        f"{row['frames']} frames with the engine {row['engine']}: p50 {row['p50']:.2f}, "
        f"p99 {row['p99']:.2f}, p99.9 {row['p99.9']:.2f} ms; drift {row['drift']:.3f}, {memory}"
    )
    return {"rows": [row], "totals": {"seconds": options.soak}}


def _mib(count: int, digits: int) -> str:
    return f"{count / 2**20:.{digits}f} MiB"


def _print(timings: list[Timing]) -> None:
    table = Table(title=f"ms per batch of {timings[0].batch}, 1080p frames")
    table.add_column("engine")
    table.add_column("stage")
    for share in ("p50", "p95", "p99"):
        table.add_column(share, justify="right")
    for timing in timings:
        rows = timing.rows()
        for row in rows:
            figures = (f"{row[share]:.3f}" for share in ("p50", "p95", "p99"))
            table.add_row(timing.engine, row["stage"], *figures, end_section=row is rows[-1])
    console = Console(markup=False)
    console.print(table)
    for timing in timings:
        t = timing.totals()
        launches = f", {t['launches']} launches" if t["launches"] else ""
        reached = t["percent_of_ceiling"]
        network = f"the network at {reached} % of " if reached else "matrix products at "
        whose = "the device" if t["device"].startswith("cuda") else "the process"
        peak = t["peak_bytes"]
        memory = "peak of memory unknown" if peak is None else f"{_mib(peak, 0)} of {whose} at most"
        console.print(
            f"{t['engine']}: {t['images_per_second']} images/s, "
            f"{network}{t['ceiling_tflops']} TFLOP/s{launches}, "
            f"{memory}, first boxes after {t['startup_s']} s"
        )


def _draw(options: Bench, timings: list[Timing]) -> None:
    if not can_plot():
        print(f"note: {NO_PLOTS}")
        return
    from yolov7.benchmark.pictures import draw  # needs matplotlib

    print(f"picture in {draw(timings, new_run(options.project, options.name))}")
