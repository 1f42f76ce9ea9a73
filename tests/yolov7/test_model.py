"""The family: tensors, parameters, FLOPs, scaling, fusing."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.conftest import reference_folder
from yolov7.blocks import Conv, DownC, Elan, PoolConv, ReOrg, RepConv
from yolov7.head import Detect
from yolov7.layers import conv_layers
from yolov7.model import YOLOv7, create_model, parameter_count
from yolov7.variants import V7_MIT, VARIANTS, Variant, scaled

ARCHITECTURES = sorted((reference_folder() / "architectures").glob("*.json"))
FUSED_PARAMETERS = {
    "yolov7-tiny": 6_219_709,
    "yolov7-tiny-silu": 6_219_709,
    "yolov7": 36_905_341,
    "yolov7x": 71_311_741,
    "yolov7-w6": 70_394_300,
    "yolov7-e6": 97_202_940,
    "yolov7-d6": 133_757_052,
    "yolov7-e6e": 151_687_420,
}
PUBLISHED_GFLOPS = {
    "yolov7-tiny": 13.8,
    "yolov7-tiny-silu": 13.8,
    "yolov7": 104.7,
    "yolov7x": 189.9,
    "yolov7-w6": 360.0,
    "yolov7-e6": 515.2,
    "yolov7-d6": 806.8,  # of the training form
    "yolov7-e6e": 843.2,
}


def empty(variant: str | Variant, form: str = "deploy", num_classes: int = 80) -> YOLOv7:
    with torch.device("meta"):
        spec = VARIANTS[variant] if isinstance(variant, str) else variant
        return YOLOv7(spec, num_classes, form)  # type: ignore[arg-type]  # a Literal


def shapes(module: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(t.shape) for n, t in module.state_dict().items() if n != "head.anchors"]


def randomise(model: nn.Module) -> None:
    """Batch-norm statistics and implicit vectors that fusing must not get wrong."""
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif name.endswith("running_mean") or "implicit_a" in name:
            tensor.normal_(0, 0.1, generator=generator)
        elif "implicit_m" in name or (name.endswith("weight") and tensor.ndim == 1):
            tensor.normal_(1, 0.1, generator=generator)


def relative_rms(a: Tensor, b: Tensor) -> float:
    return float(((a - b).double().square().mean() / b.double().square().mean()).sqrt())


@pytest.mark.parametrize("form", ["training", "deploy"])
@pytest.mark.parametrize("path", ARCHITECTURES, ids=lambda p: p.stem)
def test_tensors_are_the_authors(path: Path, form: str) -> None:
    reference = json.loads(path.read_text())[form]
    model = empty(path.stem, form)
    assert parameter_count(model) == reference["parameters"]
    theirs = [tuple(s) for n, s in reference["tensors"].items() if "anchor" not in n]
    assert shapes(model) == theirs
    real = Detect([8] * len(reference["strides"]), 1, model.variant.anchors, model.head.strides,
                  implicit=False)  # fmt: skip
    assert real.anchors.flatten(1).tolist() == reference["anchors_px"]
    assert list(model.head.strides) == reference["strides"]


@pytest.mark.parametrize("name", VARIANTS)
def test_fused_parameters_and_flops_are_the_published(name: str) -> None:
    model = empty(name, "training")
    size = model.imgsz
    training = sum(row.flops for row in conv_layers(model, size, size))
    model.fuse()
    assert parameter_count(model) == FUSED_PARAMETERS[name]
    fused = sum(row.flops for row in conv_layers(model, size, size))
    counted = training if name == "yolov7-d6" else fused
    assert counted / 1e9 == pytest.approx(PUBLISHED_GFLOPS[name], rel=0.01)


@pytest.mark.parametrize(("target", "depth", "width"), [("e6", 1.5, 1.25), ("d6", 2.0, 1.5)])
def test_w6_scales_to(target: str, depth: float, width: float) -> None:
    model = scaled(VARIANTS["yolov7-w6"], depth, width, "downc")
    assert shapes(empty(model)) == shapes(empty(f"yolov7-{target}"))


def test_scaled_backbone_of_v7_is_that_of_x() -> None:
    model = empty(scaled(VARIANTS["yolov7"], 1.5, 1.25))
    x = empty("yolov7x")
    assert shapes(model.stem) + shapes(model.backbone) == shapes(x.stem) + shapes(x.backbone)
    assert shapes(model.spp) == shapes(x.spp)


def test_scaling_keeps_elan_entries_and_rounds_channels_to_eight() -> None:
    spec = scaled(VARIANTS["yolov7-tiny"], depth=0.1, width=0.3)
    assert spec.pairs == 1
    assert [s.entry for s in spec.backbone] == [32, 64, 128, 256]
    assert [s.out for s in spec.backbone] == [24, 40, 80, 160]
    model = YOLOv7(spec, 2, "training").eval()
    assert model(torch.rand(1, 3, 64, 96)).shape == (1, 3 * (8 * 12 + 4 * 6 + 2 * 3), 7)


def test_multiplier_thins_every_convolution() -> None:
    spec = scaled(VARIANTS["yolov7-tiny"], multiplier=0.4375)
    assert [c for c, _ in spec.stem] == [16, 32]
    assert [(s.entry, s.chain, s.out) for s in spec.backbone] == [
        (16, 16, 32),
        (32, 32, 56),
        (56, 56, 112),
        (112, 112, 224),
    ]
    assert [(s.width, s.entry, s.chain) for s in spec.levels] == [
        (32, 16, 16),
        (56, 32, 32),
        (112, 56, 56),
    ]
    assert scaled(spec, multiplier=2.0).multiplier == 0.875


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "yolov8"}, "no variant 'yolov8'"),
        ({"name": "yolov7", "num_classes": 0}, "num_classes"),
        ({"name": "yolov7", "width": -1.0}, "must be positive"),
        ({"name": "yolov7", "depth": float("nan")}, "must be positive"),
        ({"name": "yolov7", "multiplier": 0.0}, "multiplier must be positive"),
        ({"name": "yolov7", "form": "fused"}, "form must be"),
        ({"name": "yolov7", "downsample": "x"}, "downsample must be"),
        ({"name": "yolov7", "num_classes": 2, "names": ["a"]}, "1 class names for 2 classes"),
    ],
)
def test_create_model_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**arguments)  # type: ignore[arg-type]  # wrong on purpose


SMALL = {  # at a small width, so that every variant runs in a moment
    name: scaled(spec, 0.5, 0.125 if spec.imgsz == 1280 else 0.25)
    for name, spec in VARIANTS.items()
}


@pytest.mark.parametrize("num_classes", [1, 3])
@pytest.mark.parametrize("name", SMALL)
def test_fused_equals_training_form(name: str, num_classes: int) -> None:
    torch.manual_seed(0)
    model = YOLOv7(SMALL[name], num_classes, "training")
    randomise(model)
    model.eval()
    x = torch.rand(2, 3, 128, 64)
    with torch.inference_mode():
        expected = model(x)
        assert model.fuse() is model
        once = model(x)
        state = {k: v.clone() for k, v in model.state_dict().items()}
        again = model.fuse()(x)
    assert relative_rms(once, expected) <= 1e-4
    assert torch.equal(once, again)
    assert state.keys() == model.state_dict().keys()
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    assert not any("implicit" in name for name in state)
    assert all(m.conv is not None for m in model.modules() if isinstance(m, RepConv))


@pytest.mark.parametrize(
    "block",
    [
        Conv(8, 16, 3, 2, "silu"),
        Conv(8, 16, 1, 1, "leaky_relu"),
        RepConv(8, 16, "silu"),
        RepConv(8, 8, "silu"),  # with the identity branch
    ],
    ids=["conv", "conv-leaky", "repconv", "repconv-identity"],
)
def test_block_fuses_to_itself(block: Conv | RepConv) -> None:
    randomise(block)
    block.eval()
    x = torch.randn(2, 8, 9, 7)
    with torch.no_grad():
        expected = block(x)
        block.fuse()
        assert relative_rms(block(x), expected) <= 1e-5
        block.fuse()
        assert relative_rms(block(x), expected) <= 1e-5


def test_repconv_has_identity_only_where_channels_match() -> None:
    assert RepConv(8, 8, "silu").identity is not None
    assert RepConv(8, 16, "silu").identity is None


def test_training_returns_lead_then_auxiliary_levels() -> None:
    model = YOLOv7(SMALL["yolov7-w6"], 2, "training")
    outputs = model(torch.rand(1, 3, 128, 128))
    assert [tuple(y.shape) for y in outputs] == 2 * [
        (1, 3, s, s, 7) for s in (16, 8, 4, 2)
    ]  # fmt: skip
    model.eval()
    decoded, raw = model(torch.rand(1, 3, 128, 128), raw=True)
    assert len(raw) == 8
    assert decoded.shape == (1, 3 * (256 + 64 + 16 + 4), 7)


def test_decode_follows_the_formula() -> None:
    head = Detect([4], 2, [(10, 13, 16, 30, 33, 23)], [8], implicit=False)
    raw = torch.randn(1, 3, 2, 3, 7)
    decoded = head.decode([raw]).view(1, 3, 2, 3, 7)
    s = raw[0, 1, 1, 2].sigmoid()
    cx, cy, w, h, *scores = decoded[0, 1, 1, 2].tolist()
    assert cx == pytest.approx(float(2 * s[0] - 0.5 + 2) * 8, rel=1e-5)
    assert cy == pytest.approx(float(2 * s[1] - 0.5 + 1) * 8, rel=1e-5)
    assert w == pytest.approx(float(2 * s[2]) ** 2 * 16, rel=1e-5)
    assert h == pytest.approx(float(2 * s[3]) ** 2 * 30, rel=1e-5)
    assert scores == pytest.approx(s[4:].tolist())


def test_reorg_order() -> None:
    x = torch.arange(4.0).view(1, 1, 2, 2)  # rows: 0 1 / 2 3
    assert ReOrg()(x).flatten().tolist() == [0, 2, 1, 3]


def test_extended_elan_sums_its_branches() -> None:
    model = YOLOv7(SMALL["yolov7-e6e"], 1, "deploy").eval()
    elan: Any = model.backbone[0].elan
    assert len(elan.branches) == 2
    x = torch.randn(1, elan.branches[0].entry1.conv.in_channels, 4, 4)
    total, last = elan(x)
    torch.testing.assert_close(total, elan.branches[0](x) + elan.branches[1](x))
    torch.testing.assert_close(last, elan.branches[1](x))


def test_downsamplings_put_the_strided_branch_first() -> None:
    for block in (PoolConv(8, 16, "silu"), DownC(8, 16, "silu")):
        block.eval()
        x = torch.randn(1, 8, 6, 6)
        y = block(x)
        assert y.shape == (1, 16, 3, 3)
        torch.testing.assert_close(y[:, :8], block.strided(block.reduce(x)))


def test_elan_taps() -> None:
    every = Elan(8, entry=4, chain=4, pairs=2, all_taps=True, out=8, activation="silu")
    pairs = Elan(8, entry=4, chain=4, pairs=2, all_taps=False, out=8, activation="silu")
    assert every.transition.conv.in_channels == 2 * 4 + 4 * 4
    assert pairs.transition.conv.in_channels == 2 * 4 + 2 * 4


def test_head_starts_from_the_prior() -> None:
    torch.manual_seed(0)
    head = Detect([4], 3, [(10, 13, 16, 30, 33, 23)], [8], implicit=True)
    bias = head.lead[0].bias
    assert isinstance(bias, Tensor)
    outputs = bias.detach().view(3, 8)
    assert outputs[:, 4].mean() == pytest.approx(-6.7, abs=0.6)  # log(8 / 80^2) = -6.68
    assert outputs[:, 5:].mean() == pytest.approx(-1.2, abs=0.6)  # log(0.6 / 2.01) = -1.21


def test_a_model_is_one_line() -> None:
    model = create_model("yolov7-tiny", 3, width=0.1)
    assert repr(model).startswith("YOLOv7('yolov7-tiny', 3 classes, form='training', ")
    assert repr(model).endswith(" M parameters)")
    assert "\n" not in repr(model)


def test_the_two_edges_that_differ_in_the_permissive_graph() -> None:
    """The finest lateral reads its stage's concat; each pool reads the one before it."""
    model = YOLOv7(scaled(V7_MIT, multiplier=0.125), 2, "deploy").eval()
    seen: dict[str, Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: seen.update({name: inputs[0]})

    for name, path in {
        "transition": "backbone.1.elan.branches.0.transition",
        "lateral": "top_down.1.lateral",
        "pyramid": "spp.cv5",
    }.items():
        model.get_submodule(path).register_forward_pre_hook(note(name))
    with torch.no_grad():
        model(torch.rand(1, 3, 256, 256))
    assert torch.equal(seen["lateral"], seen["transition"])
    y, *pools = seen["pyramid"].chunk(4, 1)
    for pool, side in zip(pools, (5, 9, 13), strict=True):
        y = F.max_pool2d(y, side, 1, side // 2)
        assert torch.equal(pool, y)
    with pytest.raises(ValueError, match="early_lateral needs one concat"):
        replace(V7_MIT, parallel=2)
