"""Four threads on one detector, from their first call on, under every engine.

    python -m tests.proof.soak --minutes 5 eager onnxruntime

First many new detectors are called by four threads at once, then one for the rest of the time,
with pictures of varying sizes. Every result is compared with that of a detector that is alone, and
memory must not grow.
"""

import argparse
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from random import Random

import cv2
import numpy as np
import torch
from torch import Tensor

from yolov7.benchmark.memory import held_bytes
from yolov7.benchmark.stages import sample_frame
from yolov7.checkpoint import load_model
from yolov7.detector import Detector
from yolov7.export import Settings, export
from yolov7.letterbox import Image

THREADS = 4
FIRST = {"eager": 12, "compile": 2, "graph": 4, "onnxruntime": 12, "openvino": 4}  # detectors
SIZE = 128  # pixels of the network's input
GROWN = 32 << 20  # bytes: more than what differs from call to call


def pictures(count: int) -> list[Image]:
    """The sample frame at sizes of all aspects."""
    random, frame = Random(0), sample_frame()
    sizes = [(random.randint(40, 400), random.randint(40, 400)) for _ in range(count)]
    return [np.asarray(cv2.resize(frame, size), np.uint8) for size in sizes]


def opener(engine: str, folder: Path) -> Callable[[], Detector]:
    """What makes a new detector with the demo weights."""
    if engine not in ("onnxruntime", "openvino"):
        return lambda: Detector(device="cpu", engine=engine, imgsz=SIZE)
    path = folder / "demo.onnx"
    if not path.exists():
        export(load_model(), path, Settings(imgsz=SIZE))
    chosen = "openvino" if engine == "openvino" else "auto"
    return lambda: Detector(path, device="cpu", engine=chosen)


@dataclass
class Soak:
    """What four threads found.

    Attributes:
        different: Calls whose boxes are not those of a detector that is alone.
        failed: Errors of calls.
        times: Of the calls, seconds.
        grown: Bytes between a third of the time and its end.
    """

    different: int = 0
    failed: list[str] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    grown: int = 0

    def __str__(self) -> str:
        p50, p99, rare = np.percentile(self.times or [0.0], (50, 99, 99.9)) * 1e3
        return (
            f"{len(self.times)} calls, {self.different} different, {len(self.failed)} failed"
            f"{': ' + self.failed[0] if self.failed else ''}; p50 {p50:.0f}, p99 {p99:.0f}, p99.9 "
            f"{rare:.0f} ms; memory grew by {self.grown / 2**20:.1f} MiB"
        )

    @property
    def sound(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.different or self.failed or self.grown > GROWN)


def soak(open_detector: Callable[[], Detector], first: int, seconds: float) -> Soak:
    """Call detectors from four threads.

    Args:
        open_detector: Makes a new one.
        first: Detectors for first calls; the last is called on.
        seconds: How long, from the beginning.
    """
    done, lock, images = Soak(), threading.Lock(), pictures(24)
    alone = open_detector()
    expected = [alone(image)[0].boxes.data for image in images]
    end = time.monotonic() + seconds

    def call(detector: Detector, number: int) -> None:
        start = time.perf_counter()
        try:
            same = _same(detector(images[number])[0].boxes.data, expected[number])
        except Exception as error:
            with lock:
                done.failed.append(repr(error)[:200])
            return
        with lock:
            done.times.append(time.perf_counter() - start)
            done.different += not same

    def go_on(seed: int, detector: Detector, until: float) -> None:
        random = Random(seed)
        while time.monotonic() < until:
            call(detector, random.randrange(len(images)))

    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(first):
            detector, barrier = open_detector(), threading.Barrier(THREADS)

            def together(
                number: int, detector: Detector = detector, barrier: threading.Barrier = barrier
            ) -> None:
                barrier.wait()
                call(detector, number)

            list(pool.map(together, range(THREADS)))
        third = time.monotonic() + (end - time.monotonic()) / 3
        list(pool.map(lambda seed: go_on(seed, detector, third), range(THREADS)))
        held = held_bytes(torch.device("cpu")) or 0
        list(pool.map(lambda seed: go_on(seed, detector, end), range(THREADS)))
        done.grown = (held_bytes(torch.device("cpu")) or 0) - held
    return done


def _same(boxes: Tensor, expected: Tensor) -> bool:
    return boxes.shape == expected.shape and torch.allclose(boxes, expected, rtol=1e-4, atol=1e-2)


def main() -> int:
    """Soak engines; 1 where something went wrong."""
    known = [name for name in FIRST if name != "openvino" or find_spec("openvino")]
    parser = argparse.ArgumentParser(description="Four threads on one detector.")
    parser.add_argument("engines", nargs="*", help=f"of {', '.join(known)} (default: all)")
    parser.add_argument("--minutes", type=float, default=5.0, help="for each engine")
    args = parser.parse_args()
    sound = True
    with tempfile.TemporaryDirectory() as folder:
        for name in args.engines or known:
            result = soak(opener(name, Path(folder)), FIRST[name], args.minutes * 60)
            print(f"{name}: {result}", flush=True)
            sound &= result.sound
    return 0 if sound else 1


if __name__ == "__main__":
    sys.exit(main())
