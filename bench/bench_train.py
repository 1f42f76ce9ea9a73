"""A training step, its loss, and the assignment of a crowded image.

`python -m bench.bench_train VARIANT SIZE BATCH` is a plain step in a process of its own.
"""

import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bench.baselines.plain import OwnProcess, serve
from bench.comparison import Comparison, Missing, close
from yolov7.benchmark.clock import Run, Work
from yolov7.engine.cpu import keep_freed_memory
from yolov7.model import YOLOv7, create_model
from yolov7.train.config import PRESETS, preset_name
from yolov7.train.ema import EMA
from yolov7.train.loss import Loss, LossWeights, head_loss
from yolov7.train.norm import join_norms
from yolov7.train.optimizer import build_optimizer

RUN = ("yolov7", 640, 64) if torch.cuda.is_available() else ("yolov7-tiny", 320, 16)
RUNS = pytest.mark.parametrize(
    ("variant", "size", "batch"), [RUN], ids=["{}, {} px, batch {}".format(*RUN)]
)
CLASSES = 80
BOXES = 8  # per image


def labels(batch: int, boxes: int, largest: float = 0.5, smallest: float = 0.02) -> Tensor:
    """Random labels `[batch, boxes, 5]`: class, centre and size as fractions."""
    random = torch.Generator().manual_seed(0)
    found = torch.rand(batch, boxes, 5, generator=random)
    found[..., 0] = (found[..., 0] * CLASSES).floor()
    found[..., 3:] = smallest + (largest - smallest) * found[..., 3:] ** 3
    return found


def random_images(size: int, batch: int) -> Tensor:
    """The same images [batch, 3, size, size] in every process."""
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0))


def model_and_loss(variant: str, size: int) -> tuple[YOLOv7, Loss, LossWeights]:
    """A fresh model with what it is trained by."""
    torch.manual_seed(0)
    model = create_model(variant, CLASSES)
    hyper = PRESETS[preset_name(model.variant)]
    weights = LossWeights.scaled(
        hyper.box,
        hyper.obj,
        hyper.cls,
        levels=len(model.head.strides),
        nc=CLASSES,
        size=size,
    )
    return model, head_loss(model, plain=False), weights


def step(
    variant: str,
    images: Tensor,
    memory_format: torch.memory_format,
    *,
    joined: bool = False,
    compiled: bool = False,
) -> Callable[[], Tensor]:
    """Forward, loss, backward, optimizer and moving average on the same images over and over.

    Args:
        variant: What is trained, from scratch.
        images: [B, 3, H, W] in 0..1.
        memory_format: Of model and images.
        joined: Norm and activation in one operation.
        compiled: The model by torch.compile.
    """
    device = images.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model, loss, weights = model_and_loss(variant, images.shape[2])
    model = model.to(device, memory_format=memory_format)  # type: ignore[call-overload]  # stub lacks it
    images = images.contiguous(memory_format=memory_format)
    truth = labels(len(images), BOXES)
    optimizer = build_optimizer(model, "sgd", 5e-4)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # so that all contenders see the same loss
    ema = EMA(model)
    if joined:
        join_norms(model)
    network = torch.compile(model) if compiled else model

    def run() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            outputs = network(images)
        terms = loss(outputs, truth)
        total = torch.stack(list(weights.weigh(terms).values())).sum() * len(images)
        total.backward()
        optimizer.step()
        ema.update(model)
        optimizer.zero_grad(set_to_none=True)
        return total.detach()

    return run


def ours(variant: str, images: Tensor) -> Callable[[], Tensor]:
    """The step as the loop takes it."""
    return step(variant, images, torch.channels_last, joined=images.is_cuda)


@RUNS
def bench_train_step(
    variant: str,
    size: int,
    batch: int,
    compete: Comparison,
    device: torch.device,
    smoke: bool,
    request: pytest.FixtureRequest,
) -> None:
    """As the loop trains, beside plain NCHW; on CUDA in bf16."""
    variant, size, batch = ("yolov7-tiny", 64, 2) if smoke else (variant, size, batch)
    images = random_images(size, batch).to(device)
    plain: Run | Missing = Missing("the eager step is plain on CUDA")
    if device.type == "cpu":
        keep_freed_memory()  # as the loop does; it serves the eager step in our process too
        process = OwnProcess("bench.bench_train", variant, size, batch)
        request.session.addfinalizer(process.close)
        plain = lambda: process().squeeze()  # noqa: E731  # one of the contenders below
    eager = step(variant, images, torch.contiguous_format)
    contenders: dict[str, Run | Missing] = {
        "ours": ours(variant, images),
        "plain": plain,
        "eager": eager,
    }
    compete(contenders, agree=close(2e-2), work=Work(items=batch))


@RUNS
def bench_loss(
    variant: str, size: int, batch: int, compete: Comparison, device: torch.device, smoke: bool
) -> None:
    """Assignment, loss and its gradients, of the step above."""
    variant, size, batch = ("yolov7-tiny", 64, 2) if smoke else (variant, size, batch)
    model, loss, weights = model_and_loss(variant, size)
    with torch.no_grad():
        model = model.train().to(device)
        outputs = model(torch.rand(batch, 3, size, size, device=device))
    outputs = [x.requires_grad_() for x in outputs]
    loss = loss.to(device)
    truth = labels(batch, BOXES)

    def run() -> None:
        total = torch.stack(list(weights.weigh(loss(outputs, truth)).values())).sum()
        torch.autograd.grad(total, outputs)

    compete({"ours": run}, agree=None, work=Work(items=batch))


@pytest.mark.parametrize("boxes", [2000], ids="{} boxes of 8 to 64 px at 640".format)
def bench_assignment(boxes: int, compete: Comparison, device: torch.device, smoke: bool) -> None:
    """One crowded image, 80 classes."""
    size = 64 if smoke else 640
    _, loss, _ = model_and_loss("yolov7-tiny", size)
    sides = [size // stride for stride in loss.anchors.strides]
    raw = [torch.randn(1, 3, side, side, 5 + CLASSES, device=device) for side in sides]
    truth = labels(1, 20 if smoke else boxes, largest=0.1, smallest=0.0125)
    compete({"ours": lambda: loss.assigner(raw, truth)}, agree=None, work=Work(items=1))


@RUNS
def bench_train_step_compiled(
    variant: str, size: int, batch: int, compete: Comparison, device: torch.device
) -> None:
    """As the loop trains, beside `torch.compile`."""
    if device.type != "cuda":
        pytest.skip("timed on CUDA only: it takes minutes to start")
    images = torch.rand(batch, 3, size, size, device=device)
    rival = step(variant, images, torch.channels_last, compiled=True)
    compete(
        {"ours": ours(variant, images), "compile": rival}, agree=close(2e-2), work=Work(items=batch)
    )


if __name__ == "__main__":
    name, side, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    serve(step(name, random_images(side, count), torch.contiguous_format))
