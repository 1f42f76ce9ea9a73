"""Copy channel slices: what is left of a concat when a producer cannot write into its slice.

On pitched maps a concat along channels is `out[:, a:b] = part` for each part, over all rows, so
the border comes along. The ELAN blocks need none of it, their producers write slices; a map that
lives in a second concat already does. All parts go in one launch.

Each program copies BLOCK_M rows x BLOCK_C channels of one part; the traffic is a read and a write
of every element and nothing else. Expected on an H200 at 4.3 TB/s: 256 channels at 80 x 80 in fp16
are 2 x 3.4 MB, border included, 1.6 us an image.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from yolov7.kernels.conv.layer import overlap
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.runtime import PRECISIONS, Config, begin, early, launch, tl, triton, triton_op

MAX_PARTS = 8


@triton.jit
def _concat_kernel(
    # Tensors, one of each per part
    part_ptrs,  # [rows, channels of the part]
    # Tensors
    out_ptr,  # [rows, all channels]
    # Shapes
    rows,
    channels,  # of each part
    # Strides
    part_strides,
    out_stride,
    # Constexprs
    PARTS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows x channels of one part; the blocks of the parts follow one another."""
    begin(PDL)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    block = tl.program_id(1)
    first = 0
    for part in tl.static_range(PARTS):
        blocks = tl.cdiv(channels[part], BLOCK_C)
        if (block >= 0) & (block < blocks):
            offs_c = block * BLOCK_C + tl.arange(0, BLOCK_C)
            mask = (offs_m < rows)[:, None] & (offs_c < channels[part])[None, :]
            part_rows = part_ptrs[part] + offs_m[:, None] * part_strides[part]
            out_rows = out_ptr + offs_m[:, None] * out_stride + first
            value = tl.load(part_rows + offs_c[None, :], mask=mask, other=0.0)
            tl.store(out_rows + offs_c[None, :], value, mask=mask)
        block -= blocks
        first += channels[part]


def launch_concat(parts: Sequence[Tensor], out: Tensor, config: Config) -> None:
    """Start the kernel; nothing is allocated or checked."""
    channels = tuple(part.shape[1] for part in parts)
    args = {
        "part_ptrs": tuple(parts),
        "out_ptr": out,
        "rows": out.shape[0],
        "channels": channels,
        "part_strides": tuple(part.stride(0) for part in parts),
        "out_stride": out.stride(0),
        "PARTS": len(parts),
    }
    blocks = sum(triton.cdiv(c, config["BLOCK_C"]) for c in channels)
    grid = (triton.cdiv(out.shape[0], config["BLOCK_M"]), blocks)
    launch(_concat_kernel, grid, args, {**config, **early(out.device)})


def concat_reference(parts: list[Tensor], out: Tensor) -> None:
    """The same in plain PyTorch."""
    out.copy_(torch.cat(parts, 1))


def _concat_triton(parts: list[Tensor], out: Tensor) -> None:
    block_c = min(128, max(16, triton.next_power_of_2(max(part.shape[1] for part in parts))))
    config = {"BLOCK_M": 8192 // block_c, "BLOCK_C": block_c, "num_warps": 4}
    launch_concat(parts, out, config)


_concat_op = triton_op(
    "concat", _concat_triton, concat_reference, lambda *_: None, mutates_args=["out"]
)


def concat(parts: Sequence[Tensor], out: Tensor) -> None:
    """Write maps side by side into the channels of another.

    Args:
        parts: [rows, c] each, 1 to 8 channel slices or whole maps of one type.
        out: [rows, sum of c], a channel slice or whole.

    Raises:
        ValueError: shapes, types or devices do not fit, or a part overlaps the output.
    """
    if not 1 <= len(parts) <= MAX_PARTS:
        raise ValueError(f"{len(parts)} parts, not 1 to {MAX_PARTS}")
    shapes = [list(part.shape) for part in parts]
    fits = all(len(shape) == 2 and shape[0] == out.shape[0] for shape in shapes)
    if not fits or out.ndim != 2 or sum(shape[1] for shape in shapes) != out.shape[1]:
        raise ValueError(f"parts {shapes} are not the channels of {list(out.shape)}")
    for part in (*parts, out):
        if (part.dtype, part.device) != (out.dtype, out.device):
            raise ValueError(
                f"part {part.dtype} on {part.device}, output {out.dtype} on {out.device}"
            )
        if part.shape[1] > 1 and part.stride(1) != 1:
            raise ValueError(f"strides {part.stride()}: channels are not contiguous")
    # A compiled graph has no addresses to compare.
    if not torch.compiler.is_compiling() and any(overlap(part, out) for part in parts):
        raise ValueError("a part overlaps the output")
    _concat_op(list(parts), out)


def compile_cases(
    batch: int = 1, precision: str = "fp16"
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches to compile ahead of time, see `yolov7.kernels.runtime.CompileSpec`."""
    layout = PitchedLayout.of(batch, 80, 80)
    out = layout.empty(512, dtype=PRECISIONS[precision], device="meta")
    for count in (1, 2, 4):
        parts = [torch.empty_like(out[:, : 512 // count]) for _ in range(count)]
        shape = f"{batch}x512x80x80 {precision}"
        yield f"{count} parts {shape}", partial(_concat_triton, parts, out)
