"""The fused convolution against PyTorch's, every option, in the interpreter or on a GPU."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov7.kernels.conv import (
    LARGEST,
    ConvCall,
    ConvConfig,
    ConvLaunch,
    ConvLayer,
    Workspace,
    pack_weight,
    quantise_weight,
)
from yolov7.kernels.conv.layer import to_dtype
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.runtime import INTERPRET

# Relative root mean square and largest error, by type: the sum is in fp32 and inputs are the same,
# so what is left is the output's rounding (half a unit: 2^-11, 2^-8, 2^-4 of the value) and, for
# TF32, the 10-bit products. The interpreter truncates to bf16, which doubles that error.
TOLERANCE = {
    torch.float16: (4e-4, 4e-3),
    torch.bfloat16: (4e-3, 3e-2),
    torch.float32: (1e-3, 1e-2),
    torch.float8_e4m3fn: (4e-2, 5e-1),
}
GATHER = ConvConfig(block_m=32, block_n=16, block_k=32)
TMA = replace(GATHER, tma=True)
PATHS = pytest.mark.parametrize("config", [GATHER, TMA], ids=["gather", "tma"])


def layer_of(
    n: int, h: int, w: int, c: int, k: int, *, border: int = 1, **options: Any
) -> ConvLayer:
    """A layer over maps with borders of so many columns and lines."""

    def layout(h: int, w: int) -> PitchedLayout:
        return PitchedLayout(n, h, w, w + border, h + border)

    source = layout(h, w)
    reduction = 2 if options.get("pool") else options.get("stride", 1)
    if options.get("upsample"):
        target = layout(2 * h, 2 * w)
    elif reduction == 2:
        rounded = (h // 2, w // 2) if options.get("pool") else ((h + 1) // 2, (w + 1) // 2)
        target = layout(*rounded)
    else:
        target = source
    return ConvLayer(source, target, c, k, **options)


def call_of(
    layer: ConvLayer,
    device: torch.device,
    dtype: torch.dtype,
    *,
    out_dtype: torch.dtype | None = None,
    residual: bool = False,
    slices: bool = False,
) -> ConvCall:
    """Random tensors for a layer, outputs O(1), the output and what surrounds slices poisoned."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(
        layer.source.n, layer.in_channels, layer.source.h, layer.source.w, generator=generator
    )
    length = layer.taps * layer.in_channels
    weight = torch.randn(layer.out_channels, length, generator=generator) * length**-0.5
    bias = torch.randn(layer.out_channels, generator=generator)
    scale = None
    if dtype in LARGEST:
        unit = 32 if dtype == torch.int8 else 1
        weight, scale = quantise_weight(weight, dtype)
        images, scale = to_dtype(images * unit, dtype, 1).float(), scale / unit
    x = layer.source.from_nchw(images)
    out_dtype = out_dtype or (torch.float16 if dtype in LARGEST else dtype)
    out = torch.full((layer.target.rows, layer.out_channels), float("nan"))
    if slices:
        x, out = (F.pad(t, (16, 16), value=float("nan")) for t in (x, out))
    x, out = x.to(device, dtype), out.to(device, out_dtype)
    if slices:
        x, out = x[:, 16:-16], out[:, 16:-16]
    added = None
    if residual:
        shape = (layer.target.n, layer.out_channels, layer.target.h, layer.target.w)
        added = layer.target.from_nchw(torch.randn(shape, generator=generator))
        added = to_dtype(added, out_dtype, layer.residual_scale).to(device)
    return ConvCall(
        layer,
        x,
        weight.to(device, dtype),
        bias.to(device),
        out,
        None if scale is None else scale.to(device),
        added,
    )


def assert_correct(call: ConvCall, dtype: torch.dtype | None = None) -> None:
    """The output equals the reference, its border is zero, and its surroundings are untouched."""
    expected = call.reference()
    actual = call.out.float()
    if call.out.dtype in LARGEST:
        actual = actual * call.layer.out_scale
    border = call.layer.target.border(actual.device)
    assert (actual[border] == 0).all(), "border"
    rms, largest = TOLERANCE[dtype or call.out.dtype]
    error = (actual - expected)[~border]
    relative = float(error.square().mean() / expected[~border].square().mean()) ** 0.5
    maximum = float(error.abs().max() / expected.abs().max().clamp_min(1))
    assert relative <= rms, f"output: relative RMS {relative}"  # false for NaN
    assert maximum <= largest, f"output: largest error {maximum}"
    if call.out._base is not None and call.out.dtype.itemsize > 1:
        wide = call.out._base
        assert wide[:, :16].isnan().all()
        assert wide[:, -16:].isnan().all()


def run(call: ConvCall, config: ConvConfig) -> None:
    run_all([call], config)


def run_all(calls: list[ConvCall], config: ConvConfig) -> None:
    workspace = Workspace()
    launch = ConvLaunch(calls).prepare(config, workspace)
    if workspace.memory is not None:
        workspace.memory.fill_(float("nan"))
    launch()


def nchw_reference(call: ConvCall) -> Tensor:
    """The layer written out with PyTorch's own operations on NCHW images."""
    layer = call.layer
    images = layer.source.to_nchw(call.x).float()
    k = layer.kernel
    weight = call.weight.float().view(layer.out_channels, k, k, -1).permute(0, 3, 1, 2)
    y = F.conv2d(images, weight, call.bias, stride=layer.stride, padding=k // 2)
    return F.silu(y)


def test_reference_is_the_convolution() -> None:
    for kernel, stride in ((3, 1), (3, 2), (1, 1)):
        layer = layer_of(2, 5, 7, 8, 6, kernel=kernel, stride=stride)
        call = call_of(layer, torch.device("cpu"), torch.float32)
        actual = call.layer.target.to_nchw(call.reference())
        torch.testing.assert_close(actual, nchw_reference(call))


SHAPES = {
    "one-pixel": (1, 1, 1, 16, 16),
    "odd": (2, 7, 9, 24, 24),
    "tall": (1, 11, 3, 40, 8),
    "batch": (3, 4, 6, 32, 40),
}


@pytest.mark.interpreter
@PATHS
@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_stride_one(
    shape: tuple[int, ...], kernel: int, config: ConvConfig, kernel_device: torch.device
) -> None:
    layer = layer_of(*shape, kernel=kernel, border=1 + shape[0])
    call = call_of(layer, kernel_device, torch.float16)
    run(call, config)
    assert_correct(call)


@pytest.mark.interpreter
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_stride_two(shape: tuple[int, ...], kernel_device: torch.device) -> None:
    call = call_of(layer_of(*shape, kernel=3, stride=2), kernel_device, torch.float16)
    run(call, GATHER)
    assert_correct(call)


@pytest.mark.interpreter
@PATHS
@pytest.mark.parametrize("activation", ["silu", "leaky_relu", "none"])
@pytest.mark.parametrize("residual", [False, True], ids=["plain", "residual"])
def test_activation_and_residual(
    activation: str, residual: bool, config: ConvConfig, kernel_device: torch.device
) -> None:
    layer = layer_of(2, 3, 5, 16, 24, activation=activation, residual_scale=0.5)
    call = call_of(layer, kernel_device, torch.float16, residual=residual)
    run(call, config)
    assert_correct(call)


@pytest.mark.interpreter
@PATHS
@pytest.mark.parametrize("kernel", [1, 3])
def test_channel_slices(kernel: int, config: ConvConfig, kernel_device: torch.device) -> None:
    """Neighbouring channels are neither read (they are NaN) nor written."""
    layer = layer_of(2, 5, 6, 24, 24, kernel=kernel)
    call = call_of(layer, kernel_device, torch.float16, slices=True)
    run(call, config)
    assert_correct(call)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (GATHER, {"kernel": 3}),
        (TMA, {"kernel": 3}),
        (GATHER, {"pool": True}),
        (GATHER, {"upsample": True}),
        (TMA, {"upsample": True}),
        (GATHER, {"exact": True}),
    ],
    ids=["gather", "tma", "pool", "upsample", "upsample-tma", "exact"],
)
def test_types(
    dtype: torch.dtype, config: ConvConfig, options: dict[str, Any], kernel_device: torch.device
) -> None:
    call = call_of(layer_of(2, 5, 6, 32, 24, **options), kernel_device, dtype, slices=True)
    run(call, config)
    assert_correct(call)


@pytest.mark.interpreter
@PATHS
def test_long_fp8_sum(config: ConvConfig, kernel_device: torch.device) -> None:
    """From 1024 terms on every block is added in fp32."""
    call = call_of(layer_of(1, 2, 3, 128, 16, kernel=3), kernel_device, torch.float8_e4m3fn)
    run(call, config)
    assert_correct(call)


@pytest.mark.interpreter
@PATHS
def test_fp8_output_saturates(config: ConvConfig, kernel_device: torch.device) -> None:
    layer = layer_of(1, 4, 5, 32, 32, activation="none", out_scale=1 / 256)
    call = call_of(
        layer, kernel_device, torch.float8_e4m3fn, out_dtype=torch.float8_e4m3fn, slices=True
    )
    run(call, config)
    expected = call.reference().clamp(-448 / 256, 448 / 256)
    assert expected.abs().max() == 448 / 256
    actual = call.out.float() / 256
    assert (actual - expected).square().mean().sqrt() <= 4e-2


@pytest.mark.interpreter
@pytest.mark.parametrize("split", [1, 3])
@pytest.mark.parametrize(
    ("config", "options"),
    [
        (GATHER, {"kernel": 3}),
        (TMA, {"kernel": 3}),
        (GATHER, {"kernel": 3, "stride": 2}),
        (GATHER, {"pool": True}),
        (TMA, {"upsample": True}),
    ],
    ids=["gather", "tma", "strided", "pool", "upsample"],
)
def test_int8_is_exact(
    config: ConvConfig, options: dict[str, Any], split: int, kernel_device: torch.device
) -> None:
    """Sums are integers, whatever splits them; what is added to them is rounded to even."""
    layer = layer_of(2, 6, 8, 48, 32, activation="none", out_scale=1 / 64, **options)
    added = "kernel" in options and "stride" not in options
    if added:
        layer = replace(layer, residual_scale=1 / 64)
    call = call_of(layer, kernel_device, torch.int8, out_dtype=torch.int8, residual=added)
    run(call, replace(config, split_k=split))
    expected = to_dtype(call.reference(), torch.int8, 1 / 64)
    assert expected.abs().max() == 127  # it saturates
    assert torch.equal(call.out, expected)


@pytest.mark.interpreter
@PATHS
@pytest.mark.parametrize("options", [{"kernel": 3}, {"upsample": True}], ids=["3x3", "upsample"])
def test_split_k(options: dict[str, Any], config: ConvConfig, kernel_device: torch.device) -> None:
    """More splits than channel blocks included: the last ones add nothing."""
    for split in (2, 4):
        layer = layer_of(2, 3, 4, 40, 24, **options)
        call = call_of(layer, kernel_device, torch.float16, residual="kernel" in options)
        run(call, replace(config, split_k=split))
        assert_correct(call)


@pytest.mark.interpreter
@PATHS
@pytest.mark.parametrize("split", [1, 2])
def test_grouped_layers(config: ConvConfig, split: int, kernel_device: torch.device) -> None:
    """Three layers of different sizes in one launch."""
    shapes = [(2, 6, 8, 16, 24), (2, 3, 4, 48, 8), (2, 1, 2, 32, 40)]
    calls = [call_of(layer_of(*s, kernel=3), kernel_device, torch.float16) for s in shapes]
    run_all(calls, replace(config, split_k=split))
    for call in calls:
        assert_correct(call)


@pytest.mark.interpreter
@pytest.mark.parametrize("split", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_pooled_beside_strided(dtype: torch.dtype, split: int, kernel_device: torch.device) -> None:
    """Two branches into neighbouring slices of one map; a pool drops the last odd line."""
    strided = call_of(layer_of(2, 6, 8, 16, 24, kernel=3, stride=2), kernel_device, dtype)
    pooled = call_of(layer_of(2, 7, 9, 40, 32, pool=True), kernel_device, dtype)
    whole = torch.full((strided.layer.target.rows, 16 + 24 + 32 + 16), float("nan"))
    whole = whole.to(kernel_device, strided.out.dtype)
    calls = [replace(strided, out=whole[:, 16:40]), replace(pooled, out=whole[:, 40:72])]
    assert pooled.layer.target == strided.layer.target
    for order in (calls, calls[::-1]):
        run_all(order, replace(GATHER, split_k=split))
        for call in calls:
            assert_correct(call)
        whole.fill_(float("nan"))


@pytest.mark.interpreter
def test_two_entries_are_one_product(kernel_device: torch.device) -> None:
    layer = layer_of(1, 4, 5, 16, 24)
    call = call_of(layer, kernel_device, torch.float32)
    first, second = call.weight.split([16, 8])
    both = pack_weight(first[:, :, None, None], second[:, :, None, None])
    assert torch.equal(both, call.weight)
    run(call, TMA)
    for part, weight in ((slice(0, 16), first), (slice(16, 24), second)):
        single = layer_of(1, 4, 5, 16, weight.shape[0])
        out = torch.empty_like(call.out[:, part])
        alone = ConvCall(single, call.x, weight.contiguous(), call.bias[part], out)
        torch.testing.assert_close(alone.reference(), call.out[:, part], atol=1e-2, rtol=1e-2)


def test_default_config_agrees_with_reference(kernel_device: torch.device) -> None:
    """As a plan prepares it, whatever runs here."""
    for options in ({"kernel": 3}, {"kernel": 3, "stride": 2}, {"pool": True}, {"upsample": True}):
        call = call_of(layer_of(2, 4, 6, 16, 24, **options), kernel_device, torch.float16)
        ConvLaunch([call]).prepare()()
        assert_correct(call)


def test_launches_share_a_workspace_that_grows(kernel_device: torch.device) -> None:
    """The first one prepared runs in the memory that the last one needs."""
    shapes = [(1, 2, 3, 40, 16), (2, 3, 4, 40, 24)]
    calls = [call_of(layer_of(*s, kernel=3), kernel_device, torch.float16) for s in shapes]
    workspace, config = Workspace(), replace(GATHER, split_k=2)
    launches = [ConvLaunch([call]).prepare(config, workspace) for call in calls]
    if INTERPRET or kernel_device.type == "cuda":
        assert workspace.memory is not None
        assert workspace.memory.numel() == 2 * calls[1].layer.compute.rows * 24
    for launch in launches:
        launch()
    for call in calls:
        assert_correct(call)


def test_empty_batch(kernel_device: torch.device) -> None:
    call = call_of(layer_of(0, 4, 6, 16, 24), kernel_device, torch.float16)
    for config in (GATHER, TMA, None):
        ConvLaunch([call]).prepare(config)()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "rank": ({"x": torch.zeros(4)}, r"input \(4,\)"),
    "rows": ({"x": torch.zeros(7, 16, dtype=torch.float16)}, r"input \(7, 16\) is not \[20"),
    "channels": ({"x": torch.zeros(20, 8, dtype=torch.float16)}, r"\(20, 8\)"),
    "weight": ({"weight": torch.zeros(24, 17, dtype=torch.float16)}, r"weight \(24, 17\)"),
    "dtype": ({"weight": torch.zeros(24, 16)}, "torch.float32 are not one of"),
    "integer": ({"out": torch.zeros(20, 24, dtype=torch.int32)}, "output torch.int32"),
    "bias": ({"bias": torch.zeros(23)}, r"bias \(23,\)"),
    "bias-dtype": ({"bias": torch.zeros(24, dtype=torch.float16)}, "bias torch.float16"),
    "layout": ({"out": torch.zeros(24, 20).T}, "no contiguous channels"),
    "residual-dtype": ({"residual": torch.zeros(20, 24).int()}, "residual torch.int32"),
    "residual": ({"residual": torch.zeros(20, 23)}, r"residual \(20, 23\)"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_named(changes: dict[str, Any], message: str) -> None:
    call = call_of(layer_of(1, 3, 4, 16, 24), torch.device("cpu"), torch.float16)
    with pytest.raises(ValueError, match=message):
        ConvLaunch([replace(call, **changes)]).prepare()


def test_devices_are_compared() -> None:
    call = call_of(layer_of(1, 3, 4, 16, 24), torch.device("cpu"), torch.float16)
    with pytest.raises(ValueError, match="bias is on meta, the input on cpu"):
        replace(call, bias=torch.zeros(24, device="meta")).check()


def test_overlapping_slices_are_refused() -> None:
    layer = layer_of(1, 3, 4, 16, 16)
    call = call_of(layer, torch.device("cpu"), torch.float16)
    wide = layer.source.zeros(48, dtype=torch.float16, device="cpu")
    replace(call, x=wide[:, :16], out=wide[:, 16:32]).check()
    replace(call, x=wide[:, 32:], out=wide[:, :16]).check()
    for start in (0, 8):
        with pytest.raises(ValueError, match="overlapping slices"):
            replace(call, x=wide[:, 8:24], out=wide[:, start : start + 16]).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernel": 5}, "5x5, stride 1"),
        ({"kernel": 1, "stride": 2}, "1x1, stride 2"),
        ({"activation": "relu"}, "'relu'"),
        ({"kernel": 3, "pool": True}, "for 1x1"),
        ({"pool": True, "upsample": True}, "exclude"),
    ],
)
def test_impossible_layers(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer_of(1, 4, 4, 8, 8, **options)
    layout = PitchedLayout.of(1, 4, 4)
    with pytest.raises(ValueError, match="the target holds 1 x 3 x 4"):
        ConvLayer(layout, PitchedLayout.of(1, 3, 4), 8, 8)
