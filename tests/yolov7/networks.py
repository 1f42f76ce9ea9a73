"""Networks for tests: stand-ins for one, and boxes by the way that suits one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from yolov7.checkpoint import load_model
from yolov7.engine.choose import open_frames
from yolov7.engine.frames import Frames
from yolov7.engine.graph.network import GraphNetwork
from yolov7.letterbox import Image, letterbox_geometry
from yolov7.model import YOLOv7
from yolov7.suppression import Suppression
from yolov7.variants import V7_MIT, VARIANTS, scaled

SIZE = 160  # enough for cells to be found, and fast


class StandIn:
    """A function from images to decoded boxes in the place of a network."""

    def __init__(
        self,
        forward: Callable[[Tensor], Tensor],
        names: Sequence[str] = ("a", "b"),
        *,
        dtype: torch.dtype = torch.float32,
        one_shape: bool = False,
    ) -> None:
        self.forward, self.names, self.stride = forward, list(names), 32
        self.device, self.dtype, self.one_shape = torch.device("cpu"), dtype, one_shape

    def __call__(self, x: Tensor) -> Tensor:
        return self.forward(x)


def graph_network(*, required: bool, guarded: bool = False) -> GraphNetwork:
    network = GraphNetwork(load_model(), torch.device("cpu"), "fp32", required=required)
    network.guarded = guarded
    return network


def detect(network: Any, images: list[Image], suppression: Suppression) -> list[Tensor]:
    """Boxes [n, 6] of each image by whatever way suits the network."""
    return run_by(open_frames(network, suppression, 1), images)


def run_by(frames: Frames, images: list[Image]) -> list[Tensor]:
    found = []
    for image in images:
        where = letterbox_geometry(image.shape[:2], SIZE, auto=True)
        ((boxes, _),) = frames.submit([frames.prepare(image, where)], [where]).wait().rows()
        found.append(boxes)
    return found


def sure(found: list[Tensor], expected: list[Tensor]) -> None:
    for boxes, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(boxes, wanted, rtol=1e-4, atol=1e-2)


SMALL = {
    name: scaled(spec, 0.5, 0.125 if spec.imgsz == 1280 else 0.25)
    for name, spec in {**VARIANTS, V7_MIT.name: V7_MIT}.items()
}


def small_model(name: str, num_classes: int = 3) -> YOLOv7:
    torch.manual_seed(0)
    model = YOLOv7(SMALL[name], num_classes, "training")
    for key, tensor in model.state_dict().items():
        if key.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith("running_mean"):
            tensor.normal_(0, 0.1)
    return model.fuse()
