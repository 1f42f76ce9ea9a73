"""The engine on CUDA beside torch.compile at its best, which takes minutes to start."""

import pytest
import torch

from bench.bench_engine import FIRST, cases, compare_frames, compare_networks, prepared
from bench.comparison import Comparison


@pytest.fixture
def cuda(device: torch.device) -> torch.device:
    """The GPU."""
    if device.type != "cuda":
        pytest.skip("timed on CUDA only; bench_network compiles for a CPU")
    return device


@cases(FIRST)
def bench_compiled(
    variant: str, batch: int, compete: Comparison, cuda: torch.device, smoke: bool
) -> None:
    """The network beside `torch.compile` at its best, captured like ours instead of by itself."""
    model, planned = prepared(variant, batch, cuda, smoke)
    # A second batch size would otherwise be compiled for any size, which is slower.
    rival = torch.compile(model, mode="max-autotune-no-cudagraphs", dynamic=False)
    compare_networks(compete, planned, "compile", rival)


@cases(FIRST)
def bench_compiled_frames(
    variant: str, batch: int, compete: Comparison, cuda: torch.device, smoke: bool
) -> None:
    """The whole way, the rival's letterbox and suppression being PyTorch's and torchvision's."""
    model, planned = prepared(variant, batch, cuda, smoke)
    rival = torch.compile(model, mode="max-autotune", dynamic=False)
    compare_frames(compete, planned, "compile", rival, smoke)
