"""How fast a model detects, stage by stage and as a whole, and whether it stays so.

A 1080p frame goes the whole way. Stages are timed one by one with the device drained between
them; the whole is what a user of `Detector` waits for. All engines take the same frame in the same
process, and so does the matrix product that says what the device can do at most.
"""

import gc
import os
import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import cv2
import numpy as np
import torch

from yolov7.detector import Detector
from yolov7.engine.choose import Runtime, open_frames
from yolov7.engine.eager import Network
from yolov7.engine.frames import Suppression
from yolov7.engine.graph.steps import Step
from yolov7.images import read_image
from yolov7.info import conv_layers
from yolov7.letterbox import Image, letterbox_geometry
from yolov7.model import YOLOv7

FRAME = (1080, 1920)  # height, width in pixels
WARM_UP = 3
MATRIX = {"cuda": 8192, "cpu": 1024}  # side of the matrices of the ceiling
COPIED = {"cuda": 1 << 30, "cpu": 1 << 27}  # bytes of its copy

Stages = Mapping[str, Callable[[], object]]


@dataclass(frozen=True)
class Timing:
    """What one engine needed.

    Attributes:
        engine: "eager", "compile" or "graph".
        device: Where its input is taken: "cpu", "cuda", "cuda:N".
        batch: Images at a time.
        samples: Stage -> milliseconds per batch; "whole" is all of it, undivided.
        startup_s: Seconds from the model to the first boxes.
        peak_bytes: Most memory held: on CUDA of the device, by this engine; on a CPU of the process
            since it began, so no less than that of an engine before.
        flops: Of one image, two per multiply-add; 0 where they are not known.
        ceiling: FLOP/s of a matrix product of this device and precision, in this run.
        bandwidth: Bytes per second of a copy, read and written, in this run.
        steps: With the engine graph, each step of the plan: name, flops, bytes, ms.
    """

    engine: str
    device: str
    batch: int
    samples: dict[str, list[float]]
    startup_s: float
    peak_bytes: int
    flops: int
    ceiling: float
    bandwidth: float
    steps: list[dict[str, Any]]

    def rows(self) -> list[dict[str, Any]]:
        """Per stage the p50, p95 and p99 in ms per batch."""
        return [
            {"engine": self.engine, "stage": stage}
            | dict(zip(("p50", "p95", "p99"), percentiles(times, 50, 95, 99), strict=True))
            for stage, times in self.samples.items()
        ]

    def totals(self) -> dict[str, Any]:
        """Images per second, percent of the ceiling that the network reaches, memory, start-up."""
        whole, network = (float(np.median(self.samples[s])) for s in ("whole", "network"))
        rate = self.flops * self.batch / network * 1e3
        return {
            "engine": self.engine,
            "device": self.device,
            "batch": self.batch,
            "images_per_second": round(1e3 * self.batch / whole, 2),
            "percent_of_ceiling": round(100 * rate / self.ceiling, 1) if self.flops else None,
            "ceiling_tflops": round(self.ceiling / 1e12, 3),
            "launches": len(self.steps) or None,
            "gb_per_second": round(self.bandwidth / 1e9, 1),
            "peak_bytes": self.peak_bytes,
            "startup_s": round(self.startup_s, 3),
        }


def percentiles(times: list[float], *shares: float) -> list[float]:
    """Percentiles of milliseconds, rounded to a tenth of a microsecond."""
    return [round(float(value), 4) for value in np.percentile(times, shares)]


def sample_frame() -> Image:
    """A packaged photograph as a frame: [1080, 1920, 3] uint8, BGR."""
    with as_file(files("yolov7.assets") / "images") as folder:
        image = read_image(min(folder.glob("*.jpg")))
    return np.asarray(cv2.resize(image, FRAME[::-1]), np.uint8)


def measure(runtime: Runtime, *, batch: int = 1, rounds: int = 50) -> Timing:
    """Time one engine.

    Args:
        runtime: Which weights run, where and how; the operations of exported files are not counted.
        batch: Images at a time, all of them the sample frame.
        rounds: Batches that are timed, after a warm-up.

    Raises:
        UserError: the engine, device or precision is not to be had here.
    """
    _forget_peak()
    frames = [sample_frame()] * batch
    start = time.perf_counter()
    detector = Detector(**vars(runtime), batch=batch)
    (height, width) = detector(frames)[0].input_shape
    startup_s = time.perf_counter() - start
    network, steps = detector.network, []
    where = [letterbox_geometry(FRAME, (height, width))] * batch
    stages = open_frames(network, Suppression(), batch).stages(frames, where)
    if isinstance(network, Network) and network.engine == "graph":
        steps = _steps(network, batch, height, width, rounds=rounds)
    samples = _timed(stages, network.device, rounds)
    samples |= _timed({"whole": lambda: detector(frames)}, network.device, rounds)
    model = runtime.weights
    layers = conv_layers(model, height, width) if isinstance(model, YOLOv7) else []
    return Timing(
        network.engine,
        str(network.device),
        batch,
        samples,
        startup_s,
        memory_bytes(network.device, peak=True),
        sum(layer.flops for layer in layers),
        matrix_rate(network.device, network.dtype),
        copy_rate(network.device),
        steps,
    )


def _steps(
    network: Network, batch: int, height: int, width: int, rounds: int
) -> list[dict[str, Any]]:
    """Medians of every step of the plan, run alone."""
    from yolov7.engine.graph.network import GraphNetwork

    assert isinstance(network, GraphNetwork)
    planned = network.planned(batch, height, width)
    launches: list[tuple[Step, Callable[[], object]]] = [
        *planned.launches(),
        (planned.plan.steps[-1], planned.decode),
    ]
    rows = []
    for step, run in launches:
        times = _timed({"step": run}, network.device, rounds)["step"]
        rows.append(
            {
                "name": ", ".join(task.name for task in step.tasks),
                "kernel": step.kind,
                "flops": planned.plan.step_flops(step),
                "bytes": planned.plan.step_bytes(step) + planned.plan.step_weight_bytes(step),
                "ms": round(float(np.median(times)), 5),
            }
        )
    return rows


def _timed(stages: Stages, device: torch.device, rounds: int) -> dict[str, list[float]]:
    samples: dict[str, list[float]] = {stage: [] for stage in stages}
    for i in range(WARM_UP + rounds):
        for stage, run in stages.items():
            start = _now(device)
            run()
            if i >= WARM_UP:
                samples[stage].append(1e3 * (_now(device) - start))
    return samples


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the best of a few large square matrix products."""
    side = MATRIX[device.type]
    a = torch.randn(side, side, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        start = _now(device)
        a @ a
        best = min(best, _now(device) - start)
    return 2 * side**3 / best


def copy_rate(device: torch.device) -> float:
    """Bytes per second that the best of a few large copies reads and writes."""
    source = torch.zeros(COPIED[device.type], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(8):
        start = _now(device)
        target.copy_(source)
        best = min(best, _now(device) - start)
    return 2 * source.numel() / best


def _forget_peak() -> None:
    """Let the peak be that of what comes; a CPU's process has one peak only."""
    if torch.cuda.is_available():
        gc.collect()  # a plan is part of a cycle: that of an engine before may still be there
        torch.cuda.init()  # there is no peak to forget before
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def memory_bytes(device: torch.device, *, peak: bool = False) -> int:
    """Memory held now or, with `peak`, at most: of the device on CUDA, of the process on a CPU."""
    if device.type == "cuda":
        held = torch.cuda.max_memory_allocated if peak else torch.cuda.memory_allocated
        return held(device)
    if peak:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def soak(detector: Detector, seconds: float) -> dict[str, Any]:
    """Detect in the sample frame, one after the other, for a while.

    Returns:
        frames; p50, p99 and p99.9 in ms; drift: the median of the last tenth over that of the
        first; growth_bytes: memory at the end less that after the first tenth.
    """
    frames = [sample_frame()] * detector.batch
    device = detector.network.device
    for _ in range(WARM_UP):
        detector(frames)
    times: list[float] = []
    early: int | None = None
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 10:
        start = _now(device)
        detector(frames)
        times.append(1e3 * (_now(device) - start))
        if early is None and time.perf_counter() - begin > seconds / 10:
            early = memory_bytes(device)
    tenth = len(times) // 10
    p50, p99, p999 = percentiles(times, 50, 99, 99.9)
    return {
        "engine": detector.network.engine,
        "frames": len(times) * detector.batch,
        "p50": p50,
        "p99": p99,
        "p99.9": p999,
        "drift": round(float(np.median(times[-tenth:]) / np.median(times[:tenth])), 4),
        "growth_bytes": memory_bytes(device) - (early or 0),
    }
