"""The portable convolution (sm_80 and up): implicit GEMM whose A rows are gathered by pointer.

The border of the pitched map makes the gather almost free: a tap's row is the output's row plus a
constant, and a row that must read as zero (left of the first, after the last, the taps of border
rows) is sent to a border row that is zero already, so no load needs a mask over pixels.

The loop runs over taps and channel blocks at once, so that the software pipeline spans the taps;
tap and channel are carried along, for a division at every step costs as much as the product of a
small tile. With 8 warps such a loop over divisions was miscompiled in PyTorch's template (pytorch
issue 173068); here none is left, and the tuner checks a config before timing it.

On Hopper, where A is multiplied out of shared memory, a tile is up to 256x128 by 8 warps: 244
registers for a 3x3 of stride 2 in fp16, none spilled, and half the traffic from the L2 cache of
64x128 by 4 warps. Beside a pooled branch it is at most 128x128 there (168 registers). Elsewhere the
accumulator needs those registers.

Expected time on an H200: as for `yolov7.kernels.conv.tma`, from the same counted bytes and
operations, at 60 to 75 % of its speed, since A passes through registers.
"""

from yolov7.kernels.conv.parts import (
    ask_for_weights,
    finish,
    layer_tiles,
    multiply,
    next_step,
    no_sum,
    split_steps,
    store_partial,
    store_rows,
    tap_shift,
)
from yolov7.kernels.runtime import begin, tl, triton


@triton.jit
def _source_rows(
    offs_m,  # [BLOCK_M] rows of the computed map
    shape,  # Geometry
    REDUCTION: tl.constexpr,
):
    """The row of the source under the centre of each computed row; past the end in the border."""
    x = offs_m % shape.pitch
    line = offs_m // shape.pitch
    y = line % shape.row_pitch
    if REDUCTION == 1:
        row = offs_m
    else:
        source_line = line // shape.row_pitch * shape.source_row_pitch + y * REDUCTION
        row = source_line * shape.source_pitch + x * REDUCTION
    inside = (x < shape.w) & (y < shape.h) & (offs_m < shape.rows)
    return tl.where(inside, row, 2 * shape.source_rows)  # outside with every tap


@triton.jit
def _load_a(
    x_ptr,  # [source_rows, c_in]
    row,  # [BLOCK_M] of the source, perhaps outside
    offs_k,  # [BLOCK_K]
    shape,  # Geometry
    EVEN_K: tl.constexpr,
):
    """Rows of the map; those outside read the border row at the end of the first line."""
    held = (row >= 0) & (row < shape.source_rows)
    row = tl.where(held, row, shape.source_pitch - 1).to(tl.int64)
    x_ptrs = x_ptr + row[:, None] * shape.x_stride + offs_k[None, :]
    if EVEN_K:
        return tl.load(x_ptrs)
    return tl.load(x_ptrs, mask=(offs_k < shape.c_in)[None, :], other=0.0)


@triton.jit
def _load_pooled(
    x_ptr,  # [source_rows, c_in]
    row,  # [BLOCK_M] of the source, perhaps outside
    offs_k,  # [BLOCK_K]
    shape,  # Geometry
    EVEN_K: tl.constexpr,
):
    """The maximum of the 2x2 pixels that begin at each row."""
    a = _load_a(x_ptr, row, offs_k, shape, EVEN_K)
    for corner in tl.static_range(1, 4):
        at = row + corner // 2 * shape.source_pitch + corner % 2
        other = _load_a(x_ptr, at, offs_k, shape, EVEN_K)
        if a.dtype == tl.float16:
            a = tl.maximum(a, other)
        elif a.dtype == tl.int8:  # in halves of registers; in bytes of them it spills
            a = tl.maximum(a.to(tl.float16), other.to(tl.float16)).to(tl.int8)
        else:
            a = tl.maximum(a.to(tl.float32), other.to(tl.float32)).to(a.dtype)
    return a


@triton.jit
def _gather_sum(
    # Tensors
    x_ptr,  # [source_rows, c_in]
    weight_ptr,  # [n_out, KERNEL * KERNEL * c_in]
    # Shapes
    offs_m,  # [BLOCK_M]
    offs_n,  # [BLOCK_N]
    split,
    shape,  # Geometry
    # Constexprs
    KERNEL: tl.constexpr,
    REDUCTION: tl.constexpr,
    PRECISION: tl.constexpr,
    PROMOTE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One split's sum over taps and channels for a tile."""
    row = _source_rows(offs_m, shape, REDUCTION)
    first, steps, tap, k = split_steps(shape.c_in, split, KERNEL, SPLIT_K, BLOCK_K)
    POOLED: tl.constexpr = KERNEL < REDUCTION  # a 1x1 that reduces is one behind a max-pool
    STAGES: tl.constexpr = 2 if POOLED else None  # its four loads a step fill the shared memory
    weight_rows = tl.minimum(offs_n, shape.n_out - 1).to(tl.int64) * (KERNEL * KERNEL * shape.c_in)
    acc = no_sum(x_ptr.dtype.element_ty, BLOCK_M, BLOCK_N)
    for _ in tl.range(first, steps, num_stages=STAGES):
        offs_k = k + tl.arange(0, BLOCK_K)
        if POOLED:
            a = _load_pooled(x_ptr, row, offs_k, shape, EVEN_K)
        else:
            a = _load_a(x_ptr, row + tap_shift(tap, shape, KERNEL), offs_k, shape, EVEN_K)
        weight_ptrs = weight_ptr + weight_rows[None, :] + tap * shape.c_in + offs_k[:, None]
        if EVEN_K:
            b = tl.load(weight_ptrs)
        else:
            b = tl.load(weight_ptrs, mask=(offs_k < shape.c_in)[:, None], other=0.0)
        acc = multiply(a, b, acc, PRECISION, PROMOTE)
        tap, k = next_step(tap, k, shape.c_in, KERNEL, BLOCK_K)
    return acc


@triton.jit
def _gather_tile(
    # Tensors
    x_ptr,  # [source_rows, c_in]
    weight_ptr,  # [n_out, KERNEL * KERNEL * c_in]
    scale_ptr,  # [n_out] fp32 or None
    bias_ptr,  # [n_out] fp32
    residual_ptr,  # [rows, n_out] or None
    out_ptr,  # [target rows, n_out]
    partial_ptr,  # [SPLIT_K, rows, n_out] fp32 or None
    # Shapes
    tile,
    shape,  # Geometry
    # Scalars
    scales,
    # Constexprs
    KERNEL: tl.constexpr,
    REDUCTION: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PROMOTE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of one layer, or one split's share of it."""
    # The tiles of a split follow one another, along the channels first.
    tiles_n = tl.cdiv(shape.n_out, BLOCK_N)
    tiles_m = tl.cdiv(shape.rows, BLOCK_M)
    split = tile // (tiles_m * tiles_n)
    offs_m = tile // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    acc = _gather_sum(
        x_ptr, weight_ptr, offs_m, offs_n, split, shape,
        KERNEL, REDUCTION, PRECISION, PROMOTE, EVEN_K, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if SPLIT_K > 1:
        store_partial(partial_ptr, acc, split, offs_m, offs_n, shape)
    else:
        acc = finish(
            acc, scale_ptr, bias_ptr, residual_ptr, offs_m, offs_n, shape, scales, ACTIVATION
        )
        store_rows(out_ptr, acc, offs_m, offs_n, shape, scales, UPSAMPLE)


@triton.jit
def conv_gather_kernel(
    # Tensors, one of each per layer of the group
    x_ptrs,
    weight_ptrs,
    scale_ptrs,
    bias_ptrs,
    residual_ptrs,
    out_ptrs,
    partial_ptrs,
    # Shapes, a Geometry per layer
    shapes,
    # Scalars, Scales per layer
    scales,
    # Constexprs
    KERNELS: tl.constexpr,  # one per layer
    REDUCTION: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PROMOTE: tl.constexpr,
    EVEN_K: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile a program; the tiles of all layers of the group, one layer after the other.

    Each layer has its own copy of the loop: a 1x1 behind a max-pool, which waits for memory, runs
    beside a 3x3 of stride 2, which multiplies, in the shared memory that the latter takes alone.
    """
    for g in tl.static_range(len(KERNELS)):
        length = KERNELS[g] * KERNELS[g] * shapes[g].c_in
        ask_for_weights(weight_ptrs[g], shapes[g].n_out * length, PDL)
    begin(PDL)
    tile = tl.program_id(0)
    for g in tl.static_range(len(KERNELS)):
        tiles = layer_tiles(shapes[g], SPLIT_K, BLOCK_M, BLOCK_N)
        if (tile >= 0) & (tile < tiles):
            _gather_tile(
                x_ptrs[g], weight_ptrs[g], scale_ptrs[g], bias_ptrs[g], residual_ptrs[g],
                out_ptrs[g], partial_ptrs[g], tile, shapes[g], scales[g],
                KERNELS[g], REDUCTION, UPSAMPLE, ACTIVATION, PRECISION, PROMOTE, EVEN_K, SPLIT_K,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        tile -= tiles
