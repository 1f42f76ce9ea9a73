"""A whole network through the kernels, against the PyTorch model."""

from dataclasses import replace

import pytest
import torch

from yolov7.checkpoint import load_model
from yolov7.engine.graph.planned import PlannedNetwork
from yolov7.kernels.conv import ConvConfig, ConvLaunch
from yolov7.model import YOLOv7
from yolov7.variants import VARIANTS, scaled


def relative_rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).double().square().mean() / b.double().square().mean()).sqrt())


@pytest.fixture(autouse=True)
def large_blocks(monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device) -> None:
    """In the interpreter an operation costs the same whatever its size."""
    if kernel_device.type == "cpu":
        large = ConvConfig(block_m=256, block_n=128, block_k=128)
        monkeypatch.setattr(ConvLaunch, "chosen", lambda _: large)


@pytest.mark.interpreter
@torch.no_grad()
def test_tiny_at_64_pixels(kernel_device: torch.device) -> None:
    model = load_model().fuse()  # yolov7-tiny
    x = torch.rand(1, 3, 64, 64)
    expected = model(x)
    planned = PlannedNetwork(
        model.to(kernel_device), 1, 64, 64, dtype=torch.float32, device=kernel_device
    )
    planned.poison()
    decoded = planned(x.to(kernel_device)).cpu()
    assert relative_rms(decoded, expected) <= 1e-4
    assert relative_rms(decoded[..., 4:], expected[..., 4:]) <= 1e-4


@pytest.mark.interpreter
@torch.no_grad()
def test_p6_with_parallel_branches_in_fp16(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    spec = scaled(VARIANTS["yolov7-e6e"], 0.1, 0.0625)
    narrow = replace(
        spec,
        backbone=tuple(replace(stage, entry=16, chain=16) for stage in spec.backbone),
        levels=tuple(replace(level, entry=16, chain=16) for level in spec.levels),
    )
    model = YOLOv7(narrow, 2, "deploy").fuse()
    x = torch.rand(2, 3, 64, 64)
    expected = model(x)
    planned = PlannedNetwork(
        model.to(kernel_device), 2, 64, 64, dtype=torch.float16, device=kernel_device
    )
    planned.poison()
    assert relative_rms(planned(x.to(kernel_device)).cpu(), expected) <= 5e-3
