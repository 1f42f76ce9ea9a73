"""What lies around the network, from a decoded photograph to boxes in its pixels.

On a CPU letterbox and suppression should cost under a tenth of the network, which is the baseline
there. What `Detector` itself adds to the way from frames to boxes should be under 30 microseconds,
at the 99th percentile under 100.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from bench.baselines.plain import image, model
from bench.bench_nms import scene
from bench.comparison import Comparison
from yolov7.benchmark.clock import Work
from yolov7.detector import Detector
from yolov7.engine.eager import Network
from yolov7.engine.frames import Done, Found, HostFrames, Pixels
from yolov7.letterbox import Geometry
from yolov7.results import Results
from yolov7.suppression import Suppression

ROWS = 25200  # of a 640-pixel image


class Prepared:
    """Stands for the network: gives boxes that are prepared, at once."""

    def __init__(self, network: Network, decoded: Tensor) -> None:
        self.device, self.dtype, self.one_shape = network.device, network.dtype, network.one_shape
        self.names, self.stride, self.decoded = network.names, network.stride, decoded

    def __call__(self, _: Tensor) -> Tensor:
        return self.decoded


@pytest.mark.parametrize("variant", ["yolov7"])
def bench_pipeline(variant: str, compete: Comparison, device: torch.device, smoke: bool) -> None:
    """Letterbox, tensor, suppression of 60 objects among 25 200 rows, results; conf 0.25."""
    if device.type != "cpu":
        pytest.skip("of a machine without a GPU; there it is one graph with the network")
    size = 64 if smoke else 640
    photo = np.random.default_rng(0).integers(0, 256, (1080, 1920, 3), np.uint8)
    detector = Detector(model(variant), device="cpu", precision="fp32", imgsz=size)
    network, x = detector.network, image(size)
    assert isinstance(network, Network)
    detector._frames = HostFrames(Prepared(network, scene(1, ROWS, device)), Suppression())

    def around() -> list[Results]:
        results = detector(photo)
        assert len(results[0]) > 30
        return results

    compete({"ours": around, "network": lambda: network(x)}, agree=None, work=Work(items=1))


class Given:
    """Stands for the way from frames to boxes: takes no time and finds what is given."""

    in_flight = 0

    def __init__(self, found: Found) -> None:
        self.found = found

    def prepare(self, pixels: Pixels, _: Geometry) -> Pixels:
        return pixels

    def submit(self, _: Sequence[Pixels], __: Sequence[Geometry]) -> Done:
        return Done(self.found)

    def stages(self, _: object, __: object) -> dict[str, Callable[[], object]]:
        return {}


def bench_overhead(compete: Comparison) -> None:
    """`detector(frame)` less letterbox, network and suppression: a 1080p array, ten boxes."""
    photo = np.zeros((1080, 1920, 3), np.uint8)
    detector = Detector(device="cpu")
    one = torch.tensor([10], dtype=torch.int32)
    detector._frames = Given(Found(torch.rand(1, 300, 6), one, one * 0, {"whole": 0.0}))
    compete({"ours": lambda: detector(photo)}, agree=None, work=Work(items=1))
