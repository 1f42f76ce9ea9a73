"""Max-pools over pitched maps: the pyramid's pools of one map at once, 2x2, and nearest upsample.

Each reads a channel slice [rows, c] and writes channel slices of other maps, with zeros in their
border. The border of the input does not count as pixels: zero would win over negative values
(SiLU goes down to -0.28), so pools take -inf there. NaN wins over numbers, as in PyTorch.

`spp` writes max-pools of sizes 5, 9 and 13 (stride 1, same size), and size 1, the map itself, into
as many slices in any order, from one read: the maximum over 13 x 13 contains the smaller ones. A
program owns BLOCK_Y lines x BLOCK_X columns x BLOCK_C channels; for each line that its windows
touch it takes the horizontal maxima from 13 shifted loads, which the L1 cache serves, and folds
them into those of its lines that reach it: 13 (BLOCK_Y + 12) / BLOCK_Y loads per element, 52 at
BLOCK_Y = 4, instead of 275 for three separate pools. PyTorch reads the map three times.

Expected on an H200 at 4.3 TB/s, fp16, per image: YOLOv7's spp of 512 channels at 20 x 20 moves 0.41
MB in and 1.23 MB out, 0.38 us; its 52 x 0.41 MB of L1 traffic take 0.8 us at 28 TB/s. 2x2 at
160 x 160 x 256 moves 13.1 + 3.3 MB, 3.8 us; upsample to 40 x 40 x 256 0.2 + 0.8 MB, 0.24 us.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov7.kernels.conv.layer import overlap
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.runtime import FLOATS, Config, begin, early, launch, tl, triton, triton_op

SPP_SIZES = (1, 5, 9, 13)


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _row_maxima(
    line_ptr, x, offs_c, mask_c, w, x_stride, BLOCK_X: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Of each pixel of a line itself and the maxima over 5, 9 and 13: [BLOCK_X, BLOCK_C] each."""
    row_5 = tl.full([BLOCK_X, BLOCK_C], float("-inf"), tl.float32)
    row_9 = row_5
    row_13 = row_5
    centre = row_5
    for shift in tl.static_range(-6, 7):
        at = x + shift
        x_ptrs = line_ptr + at[:, None] * x_stride + offs_c[None, :]
        mask = ((at >= 0) & (at < w))[:, None] & mask_c
        value = tl.load(x_ptrs, mask=mask, other=float("-inf")).to(tl.float32)
        row_13 = _larger(row_13, value)
        if shift >= -4 and shift <= 4:
            row_9 = _larger(row_9, value)
        if shift >= -2 and shift <= 2:
            row_5 = _larger(row_5, value)
        if shift == 0:
            centre = value
    return centre, row_5, row_9, row_13


@triton.jit
def _spp_kernel(
    # Tensors
    x_ptr,  # [rows, channels]
    out_ptrs,  # [rows, channels] each
    # Shapes
    h,
    w,
    pitch,
    row_pitch,
    channels,
    # Strides
    x_stride,
    out_strides,
    # Constexprs
    SIZES: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Lines x columns x channels of every pool; border pixels are written as zeros."""
    begin(PDL)
    # The block's pixels, border included, and its channels.
    blocks_x = tl.cdiv(pitch, BLOCK_X)
    pid_y, pid_x = tl.program_id(0) // blocks_x, tl.program_id(0) % blocks_x
    image = tl.program_id(2).to(tl.int64)
    y = pid_y * BLOCK_Y + tl.arange(0, BLOCK_Y)
    x = pid_x * BLOCK_X + tl.arange(0, BLOCK_X)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = (offs_c < channels)[None, :]

    # The maxima over each pixel's windows, and itself, of the lines read so far.
    max_5 = tl.full([BLOCK_Y, BLOCK_X, BLOCK_C], float("-inf"), tl.float32)
    max_9 = max_5
    max_13 = max_5
    itself = max_5
    for line in range(tl.maximum(pid_y * BLOCK_Y - 6, 0), tl.minimum((pid_y + 1) * BLOCK_Y + 6, h)):
        line_ptr = x_ptr + (image * row_pitch + line) * pitch * x_stride
        centre, row_5, row_9, row_13 = _row_maxima(
            line_ptr, x, offs_c, mask_c, w, x_stride, BLOCK_X, BLOCK_C
        )
        # It counts for the lines whose windows reach it.
        away = tl.abs(y - line)[:, None, None]
        max_13 = tl.where(away <= 6, _larger(max_13, row_13[None, :, :]), max_13)
        max_9 = tl.where(away <= 4, _larger(max_9, row_9[None, :, :]), max_9)
        max_5 = tl.where(away <= 2, _larger(max_5, row_5[None, :, :]), max_5)
        itself = tl.where(away == 0, centre[None, :, :], itself)

    # Every pixel of the block is written, zeros in the border.
    inside = (y < h)[:, None, None] & (x < w)[None, :, None]
    row = (image * row_pitch + y)[:, None, None] * pitch + x[None, :, None]
    mask = (y < row_pitch)[:, None, None] & (x < pitch)[None, :, None] & mask_c[None, :, :]
    for i in tl.static_range(COUNT):
        if SIZES[i] == 13:
            value = max_13
        elif SIZES[i] == 9:
            value = max_9
        elif SIZES[i] == 5:
            value = max_5
        else:
            value = itself
        out_ptr = out_ptrs[i] + row * out_strides[i] + offs_c[None, None, :]
        tl.store(out_ptr, tl.where(inside, value, 0.0).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _resize_kernel(
    # Tensors
    x_ptr,  # [source rows, channels]
    out_ptr,  # [target rows, channels]
    # Shapes
    rows,  # of the target, border included
    h,
    w,
    pitch,
    row_pitch,
    source_pitch,
    source_row_pitch,
    channels,
    # Strides
    x_stride,
    out_stride,
    # Constexprs
    UPSAMPLE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """BLOCK_M rows of the target: the maximum of 2x2 pixels, or a pixel repeated 2x2 times."""
    begin(PDL)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    x, line = offs_m % pitch, offs_m // pitch
    y, image = line % row_pitch, (line // row_pitch).to(tl.int64)
    mask_c = (offs_c < channels)[None, :]
    inside = ((x < w) & (y < h) & (offs_m < rows))[:, None] & mask_c
    if UPSAMPLE:
        source = (image * source_row_pitch + y // 2) * source_pitch + x // 2
        x_ptrs = x_ptr + source[:, None] * x_stride + offs_c[None, :]
        value = tl.load(x_ptrs, mask=inside, other=0.0)
    else:
        source = (image * source_row_pitch + y * 2) * source_pitch + x * 2
        x_ptrs = x_ptr + source[:, None] * x_stride + offs_c[None, :]
        value = tl.load(x_ptrs, mask=inside, other=0.0).to(tl.float32)
        for corner in tl.static_range(1, 4):
            shift = (corner // 2 * source_pitch + corner % 2) * x_stride
            value = _larger(value, tl.load(x_ptrs + shift, mask=inside, other=0.0).to(tl.float32))
    out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * out_stride + offs_c[None, :]
    value = value.to(out_ptr.dtype.element_ty)
    tl.store(out_ptrs, value, mask=(offs_m < rows)[:, None] & mask_c)


def launch_spp(
    x: Tensor,
    layout: PitchedLayout,
    outs: Sequence[Tensor],
    sizes: Sequence[int],
    config: Config,
) -> None:
    """Start the kernel of `spp`; nothing is allocated or checked."""
    blocks_y = triton.cdiv(layout.row_pitch, config["BLOCK_Y"])
    blocks_x = triton.cdiv(layout.pitch, config["BLOCK_X"])
    args = {
        "x_ptr": x,
        "out_ptrs": tuple(outs),
        "h": layout.h,
        "w": layout.w,
        "pitch": layout.pitch,
        "row_pitch": layout.row_pitch,
        "channels": x.shape[1],
        "x_stride": x.stride(0),
        "out_strides": tuple(out.stride(0) for out in outs),
        "SIZES": tuple(sizes),
        "COUNT": len(outs),
    }
    grid = (blocks_y * blocks_x, triton.cdiv(x.shape[1], config["BLOCK_C"]), layout.n)
    launch(_spp_kernel, grid, args, {**config, **early(x.device)})


def launch_resize(
    x: Tensor,
    source: PitchedLayout,
    out: Tensor,
    target: PitchedLayout,
    upsample: bool,
    config: Config,
) -> None:
    """Start the kernel of `max_pool` and `upsample`; nothing is allocated or checked."""
    args = {
        "x_ptr": x,
        "out_ptr": out,
        "rows": target.rows,
        "h": target.h,
        "w": target.w,
        "pitch": target.pitch,
        "row_pitch": target.row_pitch,
        "source_pitch": source.pitch,
        "source_row_pitch": source.row_pitch,
        "channels": x.shape[1],
        "x_stride": x.stride(0),
        "out_stride": out.stride(0),
        "UPSAMPLE": upsample,
    }
    grid = (
        triton.cdiv(target.rows, config["BLOCK_M"]), triton.cdiv(x.shape[1], config["BLOCK_C"])
    )  # fmt: skip
    launch(_resize_kernel, grid, args, {**config, **early(x.device)})


def _spp_triton(x: Tensor, outs: list[Tensor], layout: list[int], sizes: list[int]) -> None:
    at = PitchedLayout(*layout)
    block_c = min(64, max(16, triton.next_power_of_2(x.shape[1])))
    block_x = min(16, triton.next_power_of_2(at.pitch))
    config = {"BLOCK_Y": 4, "BLOCK_X": block_x, "BLOCK_C": block_c, "num_warps": 8}
    launch_spp(x, at, outs, sizes, config)


def _spp_reference(x: Tensor, outs: list[Tensor], layout: list[int], sizes: list[int]) -> None:
    at = PitchedLayout(*layout)
    images = at.to_nchw(x).float()
    for out, size in zip(outs, sizes, strict=True):
        out.copy_(at.from_nchw(F.max_pool2d(images, size, 1, size // 2)))


def _resize_triton(
    x: Tensor, out: Tensor, source: list[int], target: list[int], upsample: bool
) -> None:
    block_c = min(128, max(16, triton.next_power_of_2(x.shape[1])))
    config = {"BLOCK_M": 4096 // block_c, "BLOCK_C": block_c, "num_warps": 4}
    launch_resize(x, PitchedLayout(*source), out, PitchedLayout(*target), upsample, config)


def _resize_reference(
    x: Tensor, out: Tensor, source: list[int], target: list[int], upsample: bool
) -> None:
    images = PitchedLayout(*source).to_nchw(x).float()
    resized = F.interpolate(images, scale_factor=2.0) if upsample else F.max_pool2d(images, 2)
    out.copy_(PitchedLayout(*target).from_nchw(resized))


_spp_op = triton_op("spp", _spp_triton, _spp_reference, lambda *_: None, mutates_args=["outs"])
_resize_op = triton_op(
    "resize", _resize_triton, _resize_reference, lambda *_: None, mutates_args=["out"]
)


def _check(x: Tensor, source: PitchedLayout, outs: Sequence[Tensor], to: PitchedLayout) -> None:
    source.check(x, "input")
    if x.dtype not in FLOATS.values():
        raise ValueError(f"input {x.dtype} is none of {', '.join(FLOATS)}")
    for i, out in enumerate(outs):
        to.check(out, f"output {i}")
        if out.shape[1] != x.shape[1] or (out.dtype, out.device) != (x.dtype, x.device):
            raise ValueError(
                f"output {i}, {out.dtype} {list(out.shape)} on {out.device}, does not fit "
                f"{x.dtype} {list(x.shape)} on {x.device}"
            )
        # A compiled graph has no addresses to compare.
        compiling = torch.compiler.is_compiling()
        if not compiling and any(overlap(out, other) for other in (x, *outs[:i])):
            raise ValueError(f"output {i} overlaps the input or another output")


def spp(
    x: Tensor, layout: PitchedLayout, outs: Sequence[Tensor], sizes: Sequence[int] = (5, 9, 13)
) -> None:
    """Max-pools of one map, stride 1, same size, in one launch.

    Args:
        x: [rows, c] fp32, fp16 or bf16, a channel slice or whole.
        layout: where the pixels of all maps lie.
        outs: [rows, c] each, of the same type; written with their border, which becomes zero.
        sizes: of the windows, one for each output: 5, 9, 13, or 1 for the map itself.

    Raises:
        ValueError: sizes, shapes, types or devices do not fit, or maps overlap.
    """
    if len(sizes) != len(outs) or not outs or not set(sizes) <= set(SPP_SIZES):
        raise ValueError(f"{len(outs)} outputs, but sizes {list(sizes)}, of {SPP_SIZES}")
    _check(x, layout, outs, layout)
    _spp_op(x, list(outs), layout.sizes, list(sizes))


def max_pool(x: Tensor, source: PitchedLayout, out: Tensor, target: PitchedLayout) -> None:
    """Maximum of 2x2 pixels, stride 2; an odd last line or column is dropped.

    Args:
        x: [source.rows, c] fp32, fp16 or bf16, a channel slice or whole.
        source: where its pixels lie.
        out: [target.rows, c] of the same type; written with its border, which becomes zero.
        target: where the pixels of the output lie.

    Raises:
        ValueError: shapes, types or devices do not fit, or the maps overlap.
    """
    if (target.n, target.h, target.w) != (source.n, source.h // 2, source.w // 2):
        raise ValueError(f"2x2 pixels of {source} are not one of {target}")
    _check(x, source, [out], target)
    _resize_op(x, out, source.sizes, target.sizes, False)


def upsample(x: Tensor, source: PitchedLayout, out: Tensor, target: PitchedLayout) -> None:
    """Repeat every pixel 2x2 times; arguments and errors as in `max_pool`."""
    if (target.n, target.h, target.w) != (source.n, source.h * 2, source.w * 2):
        raise ValueError(f"a pixel of {source} is not 2x2 of {target}")
    _check(x, source, [out], target)
    _resize_op(x, out, source.sizes, target.sizes, True)


def compile_cases(
    batch: int = 1, precision: str = "fp16"
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches to compile ahead of time, see `yolov7.kernels.runtime.CompileSpec`."""
    small, large = PitchedLayout.of(batch, 20, 20), PitchedLayout.of(batch, 40, 40)
    dtype = FLOATS.get(precision, torch.float16)
    a = small.empty(2048, dtype=dtype, device="meta")
    b = large.empty(512, dtype=dtype, device="meta")
    x, *outs = a.split(512, 1)
    for name, call in (
        ("spp", partial(_spp_triton, x, outs, small.sizes, [5, 9, 13])),
        ("upsample", partial(_resize_triton, x, b, small.sizes, large.sizes, True)),
        ("2x2", partial(_resize_triton, b, x, large.sizes, small.sizes, False)),
    ):
        yield f"{name} {batch}x512 {precision}", call
