"""The graph engine's pipelines, one for each shape that images are letterboxed to."""

from collections.abc import Sequence

import torch

from yolov7.engine.pipeline import FramePipeline, Pending, Suppression
from yolov7.letterbox import Geometry, Image
from yolov7.network import PLANS, Network


class Pipelines:
    """Captured pipelines from frames to boxes; the latest few are kept.

    Args:
        network: With the engine "graph".
        batch: Images at a time.
        suppression: What is kept.
    """

    def __init__(self, network: Network, batch: int, suppression: Suppression) -> None:
        self._network, self._batch, self._suppression = network, batch, suppression
        self._pipelines: dict[tuple[int, int], FramePipeline] = {}

    def submit(self, images: Sequence[Image], geometries: Sequence[Geometry]) -> Pending:
        """Start detecting in at most ``batch`` images that have letterboxes of one shape."""
        shape = geometries[0].shape
        size = self._batch * max(image.size for image in images)
        pipeline = self._pipelines.pop(shape, None)
        if pipeline is None or pipeline.capacity < size:
            if self._network.device.type == "cuda":
                # What is under way may use the buffers that a new pipeline shares or frees.
                torch.cuda.synchronize(self._network.device)
            if len(self._pipelines) == PLANS:
                del self._pipelines[next(iter(self._pipelines))]
            network = self._network.planned(self._batch, *shape)
            pipeline = FramePipeline(network, self._suppression, capacity=size)
        self._pipelines[shape] = pipeline
        return pipeline.submit([torch.from_numpy(image) for image in images], geometries)
