import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yolov7.engine.choose import Runtime, open_network
from yolov7.engine.eager import Network
from yolov7.engine.winograd import WinogradConv, use_winograd
from yolov7.model import YOLOv7, create_model

ACTIVATIONS = {nn.SiLU(): F.silu, nn.LeakyReLU(0.1): lambda x: F.leaky_relu(x, 0.1)}
SHAPES = [(2, 16, 20, 20), (1, 16, 13, 22), (1, 16, 3, 1)]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def convolution() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(16, 32, 3, padding=1).requires_grad_(False)


@pytest.fixture(scope="module")
def tiny() -> YOLOv7:
    torch.manual_seed(0)
    return create_model("yolov7-tiny").eval().fuse().requires_grad_(False)


@pytest.mark.parametrize("act", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_a_convolution(shape: tuple[int, ...], act: nn.Module) -> None:
    conv = convolution()
    x = torch.randn(shape)
    expected = ACTIVATIONS[act](F.conv2d(x.double(), conv.weight.double(), padding=1) + 0.5)
    conv.bias.fill_(0.5)  # type: ignore[union-attr]  # it has one
    assert relative(WinogradConv(conv, act)(x), expected) < 3e-6


@pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("shape", SHAPES[:2], ids=str)
def test_compiled_it_is_a_convolution(shape: tuple[int, ...]) -> None:
    conv, act = convolution(), nn.SiLU()
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    network = nn.Sequential(WinogradConv(conv, act), nn.Conv2d(32, 16, 1), WinogradConv(conv, act))
    plain = nn.Sequential(conv, act, network[1], conv, act)
    with torch.no_grad(), torch._inductor.config.patch(freezing=True):
        assert relative(torch.compile(network, dynamic=False)(x), plain(x)) < 1e-5


def test_which_convolutions(tiny: YOLOv7) -> None:
    """Those of 3x3 and stride 1 with 64 channels or more: 15 of the 58."""
    model = copy.deepcopy(tiny)
    use_winograd(model)
    convs = dict(tiny.named_modules())
    replaced = [name for name, module in model.named_modules() if isinstance(module, WinogradConv)]
    assert len(replaced) == 15
    for name in replaced:
        conv = convs[f"{name}.conv"]
        assert isinstance(conv, nn.Conv2d)
        assert (conv.kernel_size, conv.stride) == ((3, 3), (1, 1))
        assert min(conv.in_channels, conv.out_channels) >= 64
    x = torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        for actual, expected in zip(model.lead_outputs(x), tiny.lead_outputs(x), strict=True):
            assert relative(actual, expected) < 1e-5


def test_few_channels_on_large_maps_are_convolved_directly() -> None:
    """Tiles that leave the cache cost more than is saved; with many channels they do not."""
    few = WinogradConv(nn.Conv2d(64, 64, 3, padding=1).requires_grad_(False), nn.SiLU())
    many = WinogradConv(nn.Conv2d(128, 128, 3, padding=1).requires_grad_(False), nn.SiLU())
    assert many.direct is None  # no second copy of the weights
    for batch, side, direct in [(1, 80, False), (1, 160, True), (4, 80, True)]:
        x = torch.rand(batch, 64, side, side)
        expected = F.silu(few.direct(x))  # type: ignore[misc]  # it has one
        assert torch.equal(few(x), expected) == direct
        assert relative(few(x), expected) < 3e-6


@pytest.mark.parametrize(
    ("precision", "packed", "count"), [("fp32", True, 15), ("fp32", False, 0), ("bf16", True, 0)]
)
def test_the_compile_engine_uses_it_in_fp32_with_onednn(
    tiny: YOLOv7, precision: str, packed: bool, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("yolov7.engine.compile.can_pack", lambda: packed)
    monkeypatch.setattr("shutil.which", lambda name: name)
    monkeypatch.setattr(torch, "compile", lambda outputs, **_: outputs)
    runtime = Runtime(weights=tiny, device="cpu", precision=precision, engine="compile")
    network = open_network(runtime)
    assert isinstance(network, Network)
    assert sum(isinstance(m, WinogradConv) for m in network._model.modules()) == count
