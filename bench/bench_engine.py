"""The engine on CUDA, fp16: the network alone, and the whole way from 1080p frames to boxes."""

from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec

import pytest
import torch
from torch import Tensor

from bench.bench_letterbox import eager as eager_letterbox
from bench.bench_nms import PREDICT, torchvision_loop
from bench.comparison import Comparison, Missing, close
from yolov7.benchmark.clock import Run, Work, captured
from yolov7.engine.graph.captured import FramePipeline
from yolov7.engine.graph.planned import PlannedNetwork
from yolov7.kernels.nms import Detections
from yolov7.letterbox import letterbox_geometry
from yolov7.model import YOLOv7, channels_last, create_model
from yolov7.suppression import Suppression
from yolov7.variants import VARIANTS

Forward = Callable[[Tensor], Tensor]
HEIGHT, WIDTH = 1080, 1920
BATCHES = (1, 32)
FIRST = [("yolov7", batch) for batch in BATCHES]
REST = [(name, batch) for name in VARIANTS for batch in BATCHES if name != "yolov7"]


def cases(pairs: list[tuple[str, int]]) -> pytest.MarkDecorator:
    """The axes of variants and batches."""
    names = [f"{variant}, batch {batch}" for variant, batch in pairs]
    return pytest.mark.parametrize(("variant", "batch"), pairs, ids=names)


@lru_cache(1)
def prepared(
    variant: str, batch: int, device: torch.device, smoke: bool
) -> tuple[YOLOv7, PlannedNetwork]:
    """A fused model, and the same as a plan; a narrow one if only to see that it runs."""
    torch.manual_seed(0)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    model = create_model("yolov7-tiny", 3, width=0.125) if smoke else create_model(variant)
    model = model.fuse().requires_grad_(False).to(device, dtype)
    model.head.anchors = model.head.anchors.float()
    channels_last(model)
    size = 64 if smoke else model.imgsz
    batch = 1 if smoke else batch
    return model, PlannedNetwork(model, batch, size, size, dtype=dtype, device=device)


@pytest.fixture
def engine_device(device: torch.device, smoke: bool) -> torch.device:
    """CUDA, or the CPU if only to see that it runs."""
    if device.type != "cuda" and not smoke:
        pytest.skip("of a machine with a GPU; bench_network is that of the others")
    return device


@torch.no_grad()
def compare_networks(
    compete: Comparison, planned: PlannedNetwork, name: str, rival: Forward
) -> None:
    """From the network's input to decoded boxes, all of them."""
    planned.images.copy_(torch.rand(planned.images.shape))
    images = planned.images.clone()

    def ours() -> Tensor:
        planned.run()
        return planned.decode()[0]

    theirs = partial(rival, images)
    contenders: dict[str, Run | Missing] = {
        "ours": captured(ours, planned.device),
        name: captured(theirs, planned.device),
    }

    totals = planned.plan.totals()
    moved = totals["bytes"] + totals["weight_bytes"]
    work = Work(totals["flops"], moved, planned.dtype, planned.plan.batch)
    compete(contenders, agree=close(2e-2), work=work)


def agree(theirs: Detections, ours: Detections) -> None:
    """The same number of boxes, but for those near the threshold: fresh weights find few."""
    difference = (theirs.counts - ours.counts).abs().float().mean()
    assert difference <= 5, f"{difference} boxes an image more or less"


@torch.no_grad()
def compare_frames(
    compete: Comparison, planned: PlannedNetwork, name: str, rival: Forward, smoke: bool
) -> None:
    """From uint8 frames on the device to boxes on the host, beside torchvision's NMS."""
    batch, size, device = planned.plan.batch, planned.plan.height, planned.device
    height, width = (27, 48) if smoke else (HEIGHT, WIDTH)
    geometry = letterbox_geometry((height, width), size)
    frames = [
        torch.randint(0, 256, (height, width, 3), dtype=torch.uint8, device=device)
        for _ in range(batch)
    ]

    def ours(pipeline: FramePipeline) -> Detections:
        found = pipeline.submit(frames, [geometry] * batch).wait()
        return Detections(found.boxes, found.counts, found.overflow)

    def plain() -> Detections:
        images = eager_letterbox(frames, geometry, planned.dtype)
        rows = rival(images.contiguous(memory_format=torch.channels_last))
        found = torchvision_loop(rows, PREDICT)
        return Detections(found.boxes.cpu(), found.counts, found.overflow)

    suppression = Suppression(conf=PREDICT["conf"], iou=PREDICT["iou"])
    pipeline = FramePipeline(planned, suppression, capacity=batch * frames[0].numel())
    known = find_spec("torchvision")
    missing = Missing("torchvision is not installed")
    contenders: dict[str, Run | Missing] = {
        "ours": partial(ours, pipeline),
        name: plain if known else missing,
    }
    compete(contenders, agree=agree, work=Work(items=batch), whole=True)


@cases(FIRST)
def bench_engine(
    variant: str, batch: int, compete: Comparison, engine_device: torch.device, smoke: bool
) -> None:
    """The network beside PyTorch's, channels_last."""
    model, planned = prepared(variant, batch, engine_device, smoke)
    compare_networks(compete, planned, "eager", model)


@cases(FIRST)
def bench_frames(
    variant: str, batch: int, compete: Comparison, engine_device: torch.device, smoke: bool
) -> None:
    """The whole way beside PyTorch's."""
    model, planned = prepared(variant, batch, engine_device, smoke)
    compare_frames(compete, planned, "eager", model, smoke)


@cases(REST)
def bench_family(
    variant: str, batch: int, compete: Comparison, engine_device: torch.device, smoke: bool
) -> None:
    """The networks of the other variants."""
    if smoke and variant != "yolov7-tiny":
        pytest.skip("all variants are the same toy network in a smoke test")
    model, planned = prepared(variant, batch, engine_device, smoke)
    compare_networks(compete, planned, "eager", model)
