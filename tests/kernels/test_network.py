"""A whole network through the kernels, against the PyTorch model."""

import pytest
import torch

from yolov7.checkpoint import load_model
from yolov7.engine.network import PlannedNetwork
from yolov7.model import YOLOv7
from yolov7.variants import VARIANTS, scaled


def relative_rms(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(((a - b).double().square().mean() / b.double().square().mean()).sqrt())


@pytest.mark.interpreter
@torch.no_grad()
def test_tiny_at_64_pixels(kernel_device: torch.device) -> None:
    model = load_model().fuse()  # yolov7-tiny
    x = torch.rand(1, 3, 64, 64)
    expected = model(x)
    network = PlannedNetwork(
        model.to(kernel_device), 1, 64, 64, dtype=torch.float32, device=kernel_device
    )
    network.poison()
    decoded = network(x.to(kernel_device)).cpu()
    assert relative_rms(decoded, expected) <= 1e-4
    assert relative_rms(decoded[..., 4:], expected[..., 4:]) <= 1e-4


@pytest.mark.interpreter
@torch.no_grad()
def test_p6_with_parallel_branches_in_fp16(kernel_device: torch.device) -> None:
    torch.manual_seed(0)
    model = YOLOv7(scaled(VARIANTS["yolov7-e6e"], 0.1, 0.0625), 2, "deploy").fuse()
    x = torch.rand(2, 3, 64, 64)
    expected = model(x)
    network = PlannedNetwork(
        model.to(kernel_device), 2, 64, 64, dtype=torch.float16, device=kernel_device
    )
    network.poison()
    assert relative_rms(network(x.to(kernel_device)).cpu(), expected) <= 5e-3
