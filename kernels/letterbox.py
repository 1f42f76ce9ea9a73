"""Letterbox: frames of any sizes to the network's input, in one pass.

A frame (height x width x BGR, uint8) is scaled to its box of the output, surrounded by grey 114,
turned to RGB, divided by 255 and written as fp32, fp16 or bf16 into an image batch [B, 3, H, W] of
any strides.

Scaling equals OpenCV's bilinear resize of uint8 bit for bit. Pixel d of an axis reads
f = fp32((d + 0.5) (1 / (new / old)) - 0.5), i = floor(f), with weights rint(2048 (1 - (f - i))) and
rint(2048 (f - i)); horizontally the weights of what lies outside are moved to the edge pixel,
vertically the edge row is read twice. With S0, S1 the horizontal sums of two rows and b0, b1 their
weights, the result is ((b0 (S0 >> 4) >> 16) + (b1 (S1 >> 4) >> 16) + 2) >> 2. That is integer
arithmetic which hides behind the traffic, so there is no second, approximate mode. f takes four
operations of fp64 an axis, which some GPUs do at a 64th of their rate: the scale, whose divisions
would take some forty more, comes from the host.

Frames lie in one buffer of bytes; a table [B, 9] on the device (`frame_rows`) says where, how
large, and which box of the output they fill. Nothing is read back and nothing depends on the sizes,
so a CUDA graph holds it and a replay takes other frames.

Expected on an H200 at 4.3 TB/s, 1080p -> 640 x 640 in fp16: 360 lines of the box read two rows of
5760 bytes each, 4.1 MB, and 2.5 MB are written: 1.6 us an image. Twelve byte loads a pixel of the
box, 3 wavefronts each, are 2.1 million wavefronts on 132 processors, 1.2 us. So about 2 us an image
at batch 16.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov7.kernels.runtime import FLOATS, Config, begin, early, launch, tl, triton, triton_op

GREY = 114
"""Of what lies around a frame, all three channels."""
CONFIG: Config = {"BLOCK_Y": 4, "BLOCK_X": 64, "num_warps": 4}


def frame_rows(frames: Sequence[Sequence[int]]) -> Tensor:
    """The table of `letterbox`, on the CPU.

    Args:
        frames: of each its offset in the buffer, height, width; top, left, height and width of the
            scaled frame in the output.

    Returns:
        [B, 9] int64: the same and the bits of what OpenCV scales both axes by, in fp64.
    """
    rows = torch.tensor(frames, dtype=torch.int64).view(-1, 7)
    scales = 1.0 / (rows[:, 5:7].double() / rows[:, 1:3].double())
    return torch.cat((rows, scales.view(torch.int64)), 1)


def letterbox_reference(pixels: Tensor, table: Tensor, out: Tensor) -> None:
    """Frame by frame in plain PyTorch; arguments as in the operation."""
    height, width = out.shape[2:]
    scales = table[:, 7:].view(torch.float64).tolist()
    for image, (offset, h, w, top, left, new_h, new_w) in enumerate(table[:, :7].tolist()):
        frame = pixels[offset : offset + h * w * 3].view(h, w, 3).int()
        y0, y1, b0, b1 = _axis_reference(new_h, h, scales[image][0], frame.device, clamp=False)
        x0, x1, a0, a1 = _axis_reference(new_w, w, scales[image][1], frame.device, clamp=True)
        sums = frame[:, x0] * a0[:, None] + frame[:, x1] * a1[:, None]
        upper, lower = b0[:, None, None] * (sums[y0] >> 4), b1[:, None, None] * (sums[y1] >> 4)
        canvas = torch.full((height, width, 3), GREY, dtype=torch.int32, device=frame.device)
        box = (slice(top, top + new_h), slice(left, left + new_w))
        canvas[box] = ((upper >> 16) + (lower >> 16) + 2) >> 2
        out[image] = (canvas.flip(2).float() / 255).permute(2, 0, 1).to(out.dtype)


def _axis_reference(
    new: int, old: int, scale: float, device: torch.device, *, clamp: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two pixels read along an axis and their weights, [new] int each."""
    place = torch.arange(new, device=device, dtype=torch.float64)
    place = ((place + 0.5) * scale - 0.5).float()
    first = place.floor()
    part = place - first
    first = first.int()
    if clamp:
        part[(first < 0) | (first >= old - 1)] = 0
    low, high = first.clamp(0, old - 1), (first + 1).clamp(0, old - 1)
    return low, high, ((1 - part) * 2048).round().int(), (part * 2048).round().int()


@triton.jit
def _weight(part):
    """`part` in 1 / 2048, rounded to nearest, halves to even."""
    return (part * 2048.0 + 12582912.0 - 12582912.0).to(tl.int32)  # 1.5 * 2^23 leaves no fraction


@triton.jit
def _axis(place, scale, old, CLAMP: tl.constexpr):
    """The two pixels read along an axis and their weights, int32 each."""
    scale = scale.to(tl.float64, bitcast=True)
    centre = (place.to(tl.float32) + 0.5).to(tl.float64)  # exact in either
    position = (centre * scale - 0.5).to(tl.float32)
    whole = tl.floor(position)
    part = position - whole
    first = whole.to(tl.int32)
    last = old.to(tl.int32) - 1
    if CLAMP:
        part = tl.where((first < 0) | (first >= last), 0.0, part)
    low = tl.minimum(tl.maximum(first, 0), last)
    high = tl.minimum(tl.maximum(first + 1, 0), last)
    return low, high, _weight(1.0 - part), _weight(part)


class Frame(NamedTuple):
    """A row of the table: where a frame lies, how large it is, which box it fills."""

    offset: Any
    height: Any
    width: Any
    top: Any
    left: Any
    box_height: Any
    box_width: Any
    scale_y: Any
    scale_x: Any


@triton.jit
def _read_frame(table_ptr):
    return Frame(
        tl.load(table_ptr),
        tl.load(table_ptr + 1),
        tl.load(table_ptr + 2),
        tl.load(table_ptr + 3),
        tl.load(table_ptr + 4),
        tl.load(table_ptr + 5),
        tl.load(table_ptr + 6),
        tl.load(table_ptr + 7),
        tl.load(table_ptr + 8),
    )


@triton.jit
def _read_line(pixels_ptr, line, bytes_0, bytes_1, a0, a1, in_box, size):
    """The horizontal sum of one line, [BLOCK_Y, BLOCK_X]."""
    # The table is not the host's to check: never read past the frames.
    p0 = tl.load(pixels_ptr + line + bytes_0, mask=in_box & (line + bytes_0 < size), other=0)
    p1 = tl.load(pixels_ptr + line + bytes_1, mask=in_box & (line + bytes_1 < size), other=0)
    return p0.to(tl.int32) * a0[None, :] + p1.to(tl.int32) * a1[None, :]


@triton.jit
def _letterbox_kernel(
    # Tensors
    pixels_ptr,  # [bytes] uint8
    table_ptr,  # [B, 9] int64
    out_ptr,  # [B, 3, height, width] by its strides
    # Shapes
    size,  # bytes
    height,
    width,
    # Strides
    stride_n,
    stride_c,
    stride_y,
    stride_x,
    # Constexprs
    GREY: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_X: tl.constexpr,
    PDL: tl.constexpr,
):
    """Fill one block of lines x columns of one image."""
    begin(PDL)
    image = tl.program_id(2).to(tl.int64)
    frame = _read_frame(table_ptr + image * 9)

    # Each pixel is made of two by two of the frame's, or lies around it.
    offs_y = tl.program_id(1) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    offs_x = tl.program_id(0) * BLOCK_X + tl.arange(0, BLOCK_X)
    top, left = frame.top.to(tl.int32), frame.left.to(tl.int32)
    y0, y1, b0, b1 = _axis(offs_y - top, frame.scale_y, frame.height, CLAMP=False)
    x0, x1, a0, a1 = _axis(offs_x - left, frame.scale_x, frame.width, CLAMP=True)
    in_y = (offs_y >= frame.top) & (offs_y < frame.top + frame.box_height)
    in_x = (offs_x >= frame.left) & (offs_x < frame.left + frame.box_width)
    in_box = in_y[:, None] & in_x[None, :]

    line_0 = frame.offset + (y0.to(tl.int64) * frame.width * 3)[:, None]
    line_1 = frame.offset + (y1.to(tl.int64) * frame.width * 3)[:, None]
    out_ptrs = out_ptr + image * stride_n
    out_ptrs += offs_y.to(tl.int64)[:, None] * stride_y + offs_x[None, :] * stride_x
    mask = (offs_y < height)[:, None] & (offs_x < width)[None, :]
    for channel in tl.static_range(3):
        bytes_0, bytes_1 = (x0 * 3 + channel)[None, :], (x1 * 3 + channel)[None, :]
        sum_0 = _read_line(pixels_ptr, line_0, bytes_0, bytes_1, a0, a1, in_box, size)
        sum_1 = _read_line(pixels_ptr, line_1, bytes_0, bytes_1, a0, a1, in_box, size)
        upper, lower = b0[:, None] * (sum_0 >> 4), b1[:, None] * (sum_1 >> 4)
        value = ((upper >> 16) + (lower >> 16) + 2) >> 2
        value = tl.div_rn(tl.where(in_box, value, GREY).to(tl.float32), 255.0)
        value = value.to(out_ptr.dtype.element_ty)
        tl.store(out_ptrs + (2 - channel) * stride_c, value, mask=mask)


def _letterbox_triton(pixels: Tensor, table: Tensor, out: Tensor) -> None:
    height, width = out.shape[2:]
    stride_n, stride_c, stride_y, stride_x = out.stride()
    grid = (
        triton.cdiv(width, CONFIG["BLOCK_X"]), triton.cdiv(height, CONFIG["BLOCK_Y"]), len(table)
    )  # fmt: skip
    args = {
        "pixels_ptr": pixels,
        "table_ptr": table,
        "out_ptr": out,
        "size": pixels.numel(),
        "height": height,
        "width": width,
        "stride_n": stride_n,
        "stride_c": stride_c,
        "stride_y": stride_y,
        "stride_x": stride_x,
        "GREY": GREY,
    }
    options = {**CONFIG, **early(out.device), "enable_fp_fusion": False}
    launch(_letterbox_kernel, grid, args, options)


_letterbox_op = triton_op(
    "letterbox", _letterbox_triton, letterbox_reference, lambda *_: None, mutates_args=["out"]
)


def letterbox(pixels: Tensor, table: Tensor, out: Tensor) -> Tensor:
    """Write frames as the network's input.

    Args:
        pixels: [n] uint8, the frames, each [h, w, 3] BGR without gaps.
        table: [B, 9] int64 on the same device, from `frame_rows`.
        out: [B, 3, H, W] fp32, fp16 or bf16 of any strides; all of it is written, RGB in 0..1.

    Returns:
        `out`.

    Raises:
        ValueError: wrong shape, dtype or device.
    """
    if pixels.ndim != 1 or pixels.dtype != torch.uint8:
        raise ValueError(f"pixels must be uint8 [n], got {pixels.dtype} {list(pixels.shape)}")
    if table.ndim != 2 or table.shape[1] != 9 or table.dtype != torch.int64:
        raise ValueError(f"table must be int64 [B, 9], got {table.dtype} {list(table.shape)}")
    if out.dtype not in FLOATS.values():
        raise ValueError(f"out is {out.dtype}, none of {', '.join(FLOATS)}")
    if not pixels.device == table.device == out.device:
        raise ValueError(f"devices differ: {pixels.device}, {table.device}, {out.device}")
    if out.ndim != 4 or out.shape[:2] != (len(table), 3):
        raise ValueError(f"out is {list(out.shape)}, not [{len(table)}, 3, H, W]")
    _letterbox_op(pixels, table.contiguous(), out)
    return out


def compile_cases(
    size: int = 640, batch: int = 16, precision: str = "fp16"
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches to compile ahead of time, see `yolov7.kernels.runtime.CompileSpec`."""
    pixels = torch.empty(batch * 1080 * 1920 * 3, dtype=torch.uint8, device="meta")
    table = torch.empty((batch, 9), dtype=torch.int64, device="meta")
    image = torch.empty(
        (batch, 3, size, size), dtype=FLOATS.get(precision, torch.float16), device="meta"
    )
    cases = (("NCHW", image), ("NHWC", image.to(memory_format=torch.channels_last)))
    for name, out in cases:
        call = partial(_letterbox_triton, pixels, table, out)
        yield f"{batch}x3x{size}x{size} {name} {precision}", call
