"""The portable convolution (sm_80 and up): implicit GEMM whose A rows are gathered by pointer.

The border of the pitched map makes the gather almost free: a tap's row is the output's row plus a
constant, and a row that must read as zero (left of the first, after the last, the taps of border
rows) is sent to a border row that is zero already, so no load needs a mask over pixels.

The loop runs over taps and channel blocks at once, so that the software pipeline spans the taps;
tap and channel are carried along, for a division at every step costs as much as the product of a
small tile. With 8 warps such a loop over divisions was miscompiled in PyTorch's template (pytorch
issue 173068): the default configs here use 4 warps, and the tuner checks a config before timing it.

Expected time on an H200: as for `yolov7.kernels.conv.tma`, from the same counted bytes and
operations, at 60 to 75 % of its speed, since A passes through registers.
"""

import triton
import triton.language as tl

from yolov7.kernels.conv.parts import begin, finish, multiply, store_partial, store_rows


@triton.jit
def _source_rows(
    offs_m,  # [BLOCK_M] rows of the computed map
    shape,
    REDUCTION: tl.constexpr,
):
    """The row of the source under the centre of each computed row; past the end in the border."""
    rows, h, w, pitch, row_pitch = shape[0]
    source_rows, source_pitch, source_row_pitch = shape[2]
    x = offs_m % pitch
    line = offs_m // pitch
    y = line % row_pitch
    if REDUCTION == 1:
        row = offs_m
    else:
        source_line = line // row_pitch * source_row_pitch + y * REDUCTION
        row = source_line * source_pitch + x * REDUCTION
    inside = (x < w) & (y < h) & (offs_m < rows)
    return tl.where(inside, row, 2 * source_rows)  # outside with every tap


@triton.jit
def _load_a(
    x_ptr,  # [source_rows, c_in]
    row,  # [BLOCK_M] of the source, perhaps outside
    offs_k,  # [BLOCK_K]
    c_in,
    x_stride,
    source_rows,
    source_pitch,
    EVEN_K: tl.constexpr,
):
    """Rows of the map; those outside read the border row at the end of the first line."""
    row = tl.where((row >= 0) & (row < source_rows), row, source_pitch - 1).to(tl.int64)
    x_ptrs = x_ptr + row[:, None] * x_stride + offs_k[None, :]
    if EVEN_K:
        return tl.load(x_ptrs)
    return tl.load(x_ptrs, mask=(offs_k < c_in)[None, :], other=0.0)


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
    shape,
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
    rows = shape[0][0]
    c_in, n_out = shape[1]
    source_rows, source_pitch, _ = shape[2]
    x_stride = shape[4][0]
    tiles_n = tl.cdiv(n_out, BLOCK_N)
    tiles_m = tl.cdiv(rows, BLOCK_M)
    split = tile // (tiles_m * tiles_n)
    offs_m = tile // tiles_n % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile % tiles_n * BLOCK_N + tl.arange(0, BLOCK_N)
    row = _source_rows(offs_m, shape, REDUCTION)

    blocks_k = tl.cdiv(c_in, BLOCK_K)
    steps = KERNEL * KERNEL * blocks_k
    first = 0
    if SPLIT_K > 1:
        per_split = tl.cdiv(steps, SPLIT_K)
        first = split * per_split
        steps = tl.minimum(first + per_split, steps)
    tap = 0
    k = 0
    if SPLIT_K > 1:
        tap = first // blocks_k
        k = first % blocks_k * BLOCK_K
    POOLED: tl.constexpr = KERNEL < REDUCTION  # a 1x1 that reduces is one behind a max-pool
    STAGES: tl.constexpr = 2 if POOLED else None  # its four loads a step fill the shared memory
    weight_rows = tl.minimum(offs_n, n_out - 1).to(tl.int64) * (KERNEL * KERNEL * c_in)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for _ in tl.range(first, steps, num_stages=STAGES):
        offs_k = k + tl.arange(0, BLOCK_K)
        shift = (tap // KERNEL - KERNEL // 2) * source_pitch + tap % KERNEL - KERNEL // 2
        a = _load_a(x_ptr, row + shift, offs_k, c_in, x_stride, source_rows, source_pitch, EVEN_K)
        if POOLED:
            for corner in tl.static_range(1, 4):
                at = row + corner // 2 * source_pitch + corner % 2
                other = _load_a(
                    x_ptr, at, offs_k, c_in, x_stride, source_rows, source_pitch, EVEN_K
                )
                if a.dtype == tl.float16:
                    a = tl.maximum(a, other)
                else:
                    a = tl.maximum(a.to(tl.float32), other.to(tl.float32)).to(a.dtype)
        weight_ptrs = weight_ptr + weight_rows[None, :] + tap * c_in + offs_k[:, None]
        if EVEN_K:
            b = tl.load(weight_ptrs)
        else:
            b = tl.load(weight_ptrs, mask=(offs_k < c_in)[:, None], other=0.0)
        acc = multiply(a, b, acc, PRECISION, PROMOTE)
        k += BLOCK_K
        if KERNEL > 1:
            last = k >= c_in
            tap = tl.where(last, tap + 1, tap)
            k = tl.where(last, 0, k)

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
    # Shapes, one tuple per layer
    shapes,
    # Scalars, one tuple per layer
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
    begin(PDL)
    tile = tl.program_id(0)
    for g in tl.static_range(len(KERNELS)):
        tiles = tl.cdiv(shapes[g][0][0], BLOCK_M) * tl.cdiv(shapes[g][1][1], BLOCK_N) * SPLIT_K
        if (tile >= 0) & (tile < tiles):
            _gather_tile(
                x_ptrs[g], weight_ptrs[g], scale_ptrs[g], bias_ptrs[g], residual_ptrs[g],
                out_ptrs[g], partial_ptrs[g], tile, shapes[g], scales[g],
                KERNELS[g], REDUCTION, UPSAMPLE, ACTIVATION, PRECISION, PROMOTE, EVEN_K, SPLIT_K,
                BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        tile -= tiles
