"""What lies around the network, from a decoded photograph to boxes in its pixels, on a CPU.

It should cost under a tenth of the network, which is the baseline here.
"""

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
from yolov7.engine.frames import HostFrames, Suppression
from yolov7.results import Results

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
