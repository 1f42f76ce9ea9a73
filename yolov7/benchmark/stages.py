"""How fast a model detects, stage by stage and as a whole, and whether it stays so.

A 1080p frame goes the whole way. Stages are timed one by one with the device drained between
them; the whole is what a user of `Detector` waits for. All engines take the same frame in the same
process, and so does the matrix product that says what the device can do at most.
"""

import math
import time
from dataclasses import dataclass
from importlib.resources import as_file, files
from typing import Any

import cv2
import numpy as np

from yolov7.benchmark.ceilings import Ceilings
from yolov7.benchmark.clock import Clock, Pace, percentiles, race
from yolov7.benchmark.memory import forget_peak, held_bytes, peak_bytes
from yolov7.detector import Detector
from yolov7.engine.choose import AnyNetwork, Runtime, open_frames
from yolov7.images import read_image
from yolov7.layers import conv_layers
from yolov7.letterbox import Image, letterbox_geometry
from yolov7.model import YOLOv7
from yolov7.suppression import Suppression

FRAME = (1080, 1920)  # height, width in pixels


@dataclass(frozen=True)
class Timing:
    """What one engine needed.

    Attributes:
        engine: "eager", "compile" or "graph".
        device: Where its input is taken: "cpu", "cuda", "cuda:N".
        batch: Images at a time.
        samples: Stage -> milliseconds per batch; "whole" is all of it, undivided.
        startup_s: Seconds from the model to the first boxes.
        peak_bytes: Most memory held: on CUDA of the device, by this engine; else of the process
            since it began, so no less than that of an engine before; None where no one tells.
        flops: Of one image, two per multiply-add; 0 where they are not known.
        ceiling: FLOP/s of a matrix product of this device and precision, in this run.
        bandwidth: Bytes per second of a copy, read and written, in this run.
        steps: With the engine graph, each step of the plan, see `step_timers`.
    """

    engine: str
    device: str
    batch: int
    samples: dict[str, list[float]]
    startup_s: float
    peak_bytes: int | None
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
    forget_peak()
    frames = [sample_frame()] * batch
    start = time.perf_counter()
    detector = Detector(**vars(runtime), batch=batch)
    (height, width) = detector(frames)[0].input_shape
    startup_s = time.perf_counter() - start
    network, clock = detector.network, Clock(detector.network.device)
    where = [letterbox_geometry(FRAME, (height, width))] * batch
    stages = open_frames(network, Suppression(), batch).stages(frames, where)
    pace = Pace(math.inf, most=rounds)
    seconds = race(stages, clock.whole, pace)
    seconds |= race({"whole": lambda: detector(frames)}, clock.whole, pace)
    peak = peak_bytes(network.device)  # before the ceilings, which hold memory of their own
    ceilings = Ceilings(network.device)
    model = runtime.weights
    layers = conv_layers(model, height, width) if isinstance(model, YOLOv7) else []
    return Timing(
        network.engine,
        str(network.device),
        batch,
        {stage: [1e3 * s for s in turns] for stage, turns in seconds.items()},
        startup_s,
        peak,
        sum(layer.flops for layer in layers),
        ceilings.flops(network.dtype),
        ceilings.bandwidth,
        _steps(network, ceilings, (batch, height, width), rounds),
    )


def _steps(
    network: AnyNetwork, ceilings: Ceilings, shape: tuple[int, int, int], rounds: int
) -> list[dict[str, Any]]:
    """Every step of the plan of (batch, height, width), where there is one."""
    if network.engine != "graph":
        return []
    from yolov7.benchmark.steps import step_timers
    from yolov7.engine.graph.network import GraphNetwork

    assert isinstance(network, GraphNetwork)
    return [timer() for timer in step_timers(network.planned(*shape), ceilings, rounds)]


def soak(detector: Detector, seconds: float) -> dict[str, Any]:
    """Detect in the sample frame, one after the other, for a while.

    Returns:
        frames; p50, p99 and p99.9 in ms; drift: the median of the last tenth over that of the
        first; growth_bytes: memory at the end less that after the first tenth, or None.
    """
    frames = [sample_frame()] * detector.batch
    device = detector.network.device
    clock = Clock(device)
    times: list[float] = []
    early: int | None = None
    detector(frames)  # warms up
    begin = time.perf_counter()
    while time.perf_counter() - begin < seconds or len(times) < 10:
        times.append(1e3 * clock.whole(lambda: detector(frames)))
        if early is None and time.perf_counter() - begin > seconds / 10:
            early = held_bytes(device)
    tenth = len(times) // 10
    held = held_bytes(device)
    p50, p99, p999 = percentiles(times, 50, 99, 99.9)
    return {
        "engine": detector.network.engine,
        "frames": len(times) * detector.batch,
        "p50": p50,
        "p99": p99,
        "p99.9": p999,
        "drift": round(float(np.median(times[-tenth:]) / np.median(times[:tenth])), 4),
        "growth_bytes": None if held is None or early is None else held - early,
    }
