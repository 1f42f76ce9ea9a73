"""Every step of a plan by itself, beside its roofline."""

import statistics
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from yolov7.benchmark.ceilings import Ceilings
from yolov7.benchmark.clock import Run, captured
from yolov7.engine.graph.plan import Plan
from yolov7.engine.graph.planned import PlannedNetwork
from yolov7.engine.graph.steps import Step
from yolov7.kernels.runtime import Rates


def step_timers(
    network: PlannedNetwork, ceilings: Ceilings, repeats: int
) -> Iterator[Callable[[], dict[str, Any]]]:
    """What times each step, the head's being the last, in the plan's order.

    A timer returns `kind`, `shape`, `us` (the median), `roofline_us` (the longer of the step's
    arithmetic and traffic at the ceilings' rates), `tflops` and `gbps`.

    Args:
        network: Whose input has been written.
        ceilings: Of its device.
        repeats: Turns that the median is taken of.
    """
    reached = Rates("this device", ceilings.flops(network.dtype), ceilings.bandwidth)
    runs: list[Run] = [*(run for _, run in network.launches()), network.decode]
    for step, run in zip(network.plan.steps, runs, strict=True):
        yield partial(_time, network.plan, step, run, ceilings, reached, repeats)


def _time(
    plan: Plan, step: Step, run: Run, ceilings: Ceilings, reached: Rates, repeats: int
) -> dict[str, Any]:
    flops = plan.step_flops(step)
    moved = plan.step_bytes(step) + plan.step_weight_bytes(step)
    replay = captured(run, ceilings.device)
    seconds = statistics.median(ceilings.clock(replay) for _ in range(repeats))
    return {
        "kind": step.kind,
        "shape": "; ".join(task.describe() for task in step.tasks),
        "us": seconds * 1e6,
        "roofline_us": reached.seconds(flops, moved) * 1e6,
        "tflops": flops / seconds / 1e12,
        "gbps": moved / seconds / 1e9,
    }
