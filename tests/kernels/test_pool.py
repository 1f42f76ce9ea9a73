from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.kernels import COMPILED
from yolov7.kernels import pool
from yolov7.kernels.aot import compile_all, passed_limits
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.pool import max_pool, spp, upsample
from yolov7.kernels.runtime import FLOATS


def make_map(layout: PitchedLayout, channels: int, device: torch.device) -> Tensor:
    """Negative values too, in a channel slice of a wider map, zero in the border."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(layout.n, channels + 5, layout.h, layout.w, generator=random) - 1.5
    return layout.from_nchw(images)[:, 2 : 2 + channels].to(device)


def poisoned(layout: PitchedLayout, channels: int, like: Tensor) -> Tensor:
    """A channel slice of a wider map of NaN."""
    wide = layout.empty(channels + 3, dtype=like.dtype, device=like.device)
    return wide.fill_(torch.nan)[:, 1 : 1 + channels]


def assert_map(layout: PitchedLayout, found: Tensor, expected: Tensor) -> None:
    """Equal pixels, zero border, and nothing written beside the slice."""
    assert torch.equal(layout.to_nchw(found), expected)
    assert not found[layout.border(found.device)].any()
    base = found._base
    assert base is not None
    assert base[:, 0].isnan().all()
    assert base[:, -1].isnan().all()


LAYOUTS = [
    PitchedLayout.of(2, 7, 9),
    PitchedLayout.of(1, 20, 13),
    PitchedLayout.of(2, 1, 1),
    PitchedLayout(1, 5, 33, 40, 9),
]


@pytest.mark.interpreter
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_spp(layout: PitchedLayout, kernel_device: torch.device) -> None:
    x = make_map(layout, 24, kernel_device)
    images = layout.to_nchw(x)
    sizes = (13, 1, 5, 9)
    outs = [poisoned(layout, 24, x) for _ in sizes]
    spp(x, layout, outs, sizes)
    for out, size in zip(outs, sizes, strict=True):
        assert_map(layout, out, F.max_pool2d(images, size, 1, size // 2))


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_spp_into_slices_beside_its_input(dtype: torch.dtype, kernel_device: torch.device) -> None:
    layout = PitchedLayout.of(1, 6, 5)
    wide = layout.empty(4 * 16, dtype=dtype, device=kernel_device).fill_(torch.nan)
    *outs, x = wide.split(16, 1)
    x.copy_(make_map(layout, 16, kernel_device))
    spp(x, layout, outs, (13, 9, 5))
    pooled = [F.max_pool2d(layout.to_nchw(x).float(), s, 1, s // 2) for s in (13, 9, 5, 1)]
    assert torch.equal(layout.to_nchw(wide).float(), torch.cat(pooled, 1))
    assert not wide[layout.border(wide.device)].any()


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("size", [(7, 9), (8, 6), (2, 2)], ids=str)
def test_max_pool(size: tuple[int, int], dtype: torch.dtype, kernel_device: torch.device) -> None:
    source = PitchedLayout.of(2, *size)
    target = PitchedLayout.of(2, size[0] // 2, size[1] // 2)
    x = make_map(source, 7, kernel_device).to(dtype)
    out = poisoned(target, 7, x)
    max_pool(x, source, out, target)
    assert_map(target, out, F.max_pool2d(source.to_nchw(x), 2))


@pytest.mark.interpreter
@pytest.mark.parametrize("size", [(5, 3), (1, 8)], ids=str)
def test_upsample(size: tuple[int, int], kernel_device: torch.device) -> None:
    source = PitchedLayout.of(2, *size)
    target = PitchedLayout.of(2, 2 * size[0], 2 * size[1])
    x = make_map(source, 63, kernel_device)
    out = poisoned(target, 63, x)
    upsample(x, source, out, target)
    assert_map(target, out, F.interpolate(source.to_nchw(x), scale_factor=2.0))


@pytest.mark.interpreter
def test_nan_wins(kernel_device: torch.device) -> None:
    layout, half = PitchedLayout.of(1, 16, 16), PitchedLayout.of(1, 8, 8)
    x = make_map(layout, 2, kernel_device)
    layout.image_view(x)[0, 4, 5, 0] = torch.nan
    outs = [poisoned(layout, 2, x) for _ in range(3)]
    spp(x, layout, outs)
    counts = [int(layout.to_nchw(out).isnan().sum()) for out in outs]
    assert counts == [25, 9 * 9, 11 * 12]
    out = poisoned(half, 2, x)
    max_pool(x, layout, out, half)
    assert layout.to_nchw(x).isnan().sum() == half.to_nchw(out).isnan().sum() == 1


def test_references_pool_without_border() -> None:
    layout, half = PitchedLayout.of(1, 4, 4), PitchedLayout.of(1, 2, 2)
    x = layout.from_nchw(-torch.ones(1, 1, 4, 4))
    outs = [layout.empty(1, dtype=x.dtype, device="cpu") for _ in range(3)]
    spp(x, layout, outs)
    for out in outs:
        assert torch.equal(out, x)
    out = half.empty(1, dtype=x.dtype, device="cpu")
    max_pool(x, layout, out, half)
    assert torch.equal(out, half.from_nchw(-torch.ones(1, 1, 2, 2)))


def test_empty_batch() -> None:
    layout = PitchedLayout.of(0, 4, 4)
    spp(torch.empty(0, 3), layout, [torch.empty(0, 3)] * 3)


def test_operations() -> None:
    layout, half = PitchedLayout.of(1, 4, 6), PitchedLayout.of(1, 2, 3)
    x, y = torch.randn(layout.rows, 3), torch.randn(half.rows, 3)
    outs = [torch.empty_like(x) for _ in range(2)]
    torch.library.opcheck(pool._spp_op, (x, outs, layout.sizes, [5, 13]))
    torch.library.opcheck(pool._resize_op, (x, y, layout.sizes, half.sizes, False))
    torch.library.opcheck(pool._resize_op, (y, x, half.sizes, layout.sizes, True))


def test_compiles_as_one_graph() -> None:
    layout = PitchedLayout.of(1, 6, 5)

    def pooled(x: Tensor) -> Tensor:
        wide = torch.zeros(layout.rows, 3 * x.shape[1])
        spp(x, layout, wide.split(x.shape[1], 1))
        return wide

    x = layout.from_nchw(torch.randn(1, 4, 6, 5))
    compiled: Callable[[Tensor], Tensor] = torch.compile(
        pooled, fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(x), pooled(x))


LAYOUT, HALF = PitchedLayout.of(1, 4, 4), PitchedLayout.of(1, 2, 2)
MAP = torch.zeros(LAYOUT.rows, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: spp(MAP, LAYOUT, [MAP.clone()]), r"1 outputs, but sizes \[5, 9, 13\]"),
        (lambda: spp(MAP, LAYOUT, [MAP.clone()], (7,)), r"sizes \[7\]"),
        (lambda: spp(MAP, LAYOUT, [MAP], (5,)), "overlaps the input"),
        (lambda: spp(MAP[:3], LAYOUT, [MAP], (5,)), r"input \(3, 4\)"),
        (lambda: spp(MAP.int(), LAYOUT, [MAP], (5,)), r"input torch\.int32"),
        (lambda: spp(MAP, LAYOUT, [MAP.clone()[:, :3]], (5,)), r"\[\d+, 3\] .* \[\d+, 4\]"),
        (lambda: spp(MAP, LAYOUT, [MAP.half()], (5,)), r"output 0, torch\.float16"),
        (lambda: max_pool(MAP, LAYOUT, MAP, LAYOUT), "2x2 pixels of"),
        (lambda: upsample(MAP, LAYOUT, MAP, HALF), "is not 2x2 of"),
    ],
)
def test_wrong_input(call: Callable[[], None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.aot
@pytest.mark.parametrize("target", COMPILED)
def test_compiles_within_the_limits(target: str) -> None:
    rows = list(compile_all(target, {}, only=["pool"]))
    assert {row.kernel for row in rows} == {"_spp_kernel", "_resize_kernel"}
    assert not [f"{row.shape}: {limit}" for row in rows for limit in passed_limits(row)]
