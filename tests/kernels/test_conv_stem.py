"""The first convolution against PyTorch's, in the interpreter or on a GPU."""

import os
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov7.kernels.conv import Stem, StemCall, StemLaunch, pack_weight, space_to_depth_weight
from yolov7.kernels.layout import PitchedLayout

# fp32 is multiplied as TF32 on a GPU, which rounds each factor by up to 2^-11.
TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 5e-3}


def problem(
    n: int, h: int, w: int, out: int, kernel: int = 3, stride: int = 1
) -> tuple[Stem, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    pad = (kernel - 1) // 2
    sizes = [(side + 2 * pad - kernel) // stride + 1 for side in (h, w)]
    stem = Stem(PitchedLayout.of(n, *sizes), kernel, stride)
    images = torch.rand(n, 3, h, w, generator=generator)
    weight = torch.randn(out, 3, kernel, kernel, generator=generator) * 0.3
    return stem, images, pack_weight(weight), torch.randn(out, generator=generator)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "case",
    [(1, 7, 5, 8), (2, 6, 9, 32), (2, 7, 6, 24, 3, 2), (2, 8, 6, 40, 6, 2), (1, 1, 1, 8)],
    ids=["odd", "batch", "strided", "p6", "one-pixel"],
)
def test_stem(case: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device) -> None:
    stem, images, weight, bias = problem(*case)
    images, weight = images.to(kernel_device, dtype), weight.to(kernel_device, dtype)
    bias = bias.to(kernel_device)
    out = stem.target.empty(len(bias), dtype=dtype, device=kernel_device).fill_(float("nan"))
    call = StemCall(stem, images, weight, bias, out)
    StemLaunch(call).prepare()()
    expected = call.reference()
    assert (out[stem.target.border(kernel_device)] == 0).all()
    error = (out.float() - expected).abs() / expected.abs().clamp_min(1)
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"  # which multiplies fp32 as it is
    exact = interpreted and dtype == torch.float32
    assert error.max() <= (1e-5 if exact else TOLERANCE[dtype])


@pytest.mark.interpreter
@pytest.mark.parametrize("out", [32, 40, 80])
def test_exact_stem(out: int, kernel_device: torch.device) -> None:
    """Products of fp32, over blocks of channels, the last one partly empty."""
    stem, images, weight, bias = problem(1, 8, 6, out, 6, 2)
    images, weight, bias = (t.to(kernel_device) for t in (images, weight, bias))
    written = stem.target.empty(out, dtype=torch.float32, device=kernel_device).fill_(float("nan"))
    call = StemCall(replace(stem, exact=True), images, weight, bias, written)
    StemLaunch(call).prepare()()
    torch.testing.assert_close(written, call.reference(), atol=1e-5, rtol=1e-5)


@pytest.mark.interpreter
def test_reads_a_pitched_map_and_writes_a_slice(kernel_device: torch.device) -> None:
    stem, images, weight, bias = problem(2, 5, 6, 8)
    pixels = stem.target.image_view(stem.target.from_nchw(images).half().to(kernel_device))
    wide = stem.target.empty(24, dtype=torch.float16, device=kernel_device).fill_(float("nan"))
    weight, bias = weight.half().to(kernel_device), bias.to(kernel_device)
    call = StemCall(stem, pixels.permute(0, 3, 1, 2), weight, bias, wide[:, 8:16])
    StemLaunch(call).prepare()()
    assert wide[:, :8].isnan().all()
    assert wide[:, 16:].isnan().all()
    torch.testing.assert_close(wide[:, 8:16].float(), call.reference(), atol=2e-3, rtol=2e-3)


def test_space_to_depth_is_a_strided_convolution() -> None:
    images, weight = torch.randn(2, 3, 8, 12), torch.randn(5, 12, 3, 3)
    rearranged = torch.cat(
        [
            images[..., ::2, ::2],
            images[..., 1::2, ::2],
            images[..., ::2, 1::2],
            images[..., 1::2, 1::2],
        ],
        1,
    )
    expected = F.conv2d(rearranged, weight, padding=1)
    actual = F.conv2d(images, space_to_depth_weight(weight), stride=2, padding=2)
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)
    stem = Stem(PitchedLayout.of(2, 4, 6), 6, 2, "none")
    packed = pack_weight(space_to_depth_weight(weight))
    out = stem.target.empty(5, dtype=torch.float32, device="cpu")
    StemLaunch(StemCall(stem, images, packed, torch.zeros(5), out)).prepare()()
    torch.testing.assert_close(stem.target.to_nchw(out), expected, atol=1e-2, rtol=1e-2)


def test_empty_batch(kernel_device: torch.device) -> None:
    _, images, weight, bias = problem(1, 4, 5, 16)
    images, weight, bias = (t.to(kernel_device) for t in (images, weight, bias))
    stem = Stem(PitchedLayout.of(0, 4, 5))
    out = stem.target.empty(16, dtype=weight.dtype, device=kernel_device)
    StemLaunch(StemCall(stem, images[:0], weight, bias, out)).prepare()()


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "images": ({"images": torch.zeros(1, 3, 4, 4)}, r"images \(1, 3, 4, 4\) do not give 1 x 4 x 5"),
    "rank": ({"images": torch.zeros(4, 4)}, r"images \(4, 4\) do not give"),
    "weight": ({"weight": torch.zeros(16, 26)}, r"weight \(16, 26\)"),
    "vector": ({"weight": torch.zeros(27)}, r"weight \(27,\)"),
    "bias": ({"bias": torch.zeros(15)}, r"bias torch.float32 \(15,\)"),
    "device": ({"bias": torch.zeros(16, device="meta")}, "bias is on meta, the output on cpu"),
    "dtype": ({"weight": torch.zeros(16, 27).int()}, "no such stem"),
}


@pytest.mark.parametrize(("changes", "message"), WRONG.values(), ids=WRONG.keys())
def test_wrong_input_is_named(changes: dict[str, Any], message: str) -> None:
    stem, images, weight, bias = problem(1, 4, 5, 16)
    call = StemCall(
        stem, images, weight, bias, stem.target.zeros(16, dtype=torch.float32, device="cpu")
    )
    with pytest.raises(ValueError, match=message):
        StemLaunch(replace(call, **changes)).prepare()


def test_impossible_stems() -> None:
    target = PitchedLayout.of(1, 4, 5)
    with pytest.raises(ValueError, match="5x5"):
        Stem(target, 5)
    with pytest.raises(ValueError, match="relu6"):
        Stem(target, activation="relu6")  # type: ignore[arg-type]  # that is the point
