"""The Hopper convolution: shifted matrix products through tensor descriptors, persistent.

On a pitched map tap ``(r, s)`` of a 3x3 convolution is a plain 2-d block of rows, so both operands
come by TMA and both stay in shared memory for the warp-group matrix instructions (HGMMA, QGMMA):
no address arithmetic, no registers for A. Rows before the first and after the last, and channels
beyond the slice, are zero-filled by the hardware; a weight block that reaches into the next tap
there meets those zeros.

Expected time on an H200, from counted bytes and operations (4.3 TB/s, 790 TFLOP/s in fp16): v7 at
640 is 104.5 GFLOP over 0.41 GB of maps and 74 MB of weights. Every layer at the larger of its own
two bounds gives 151 us per image: 94 in 3x3 layers, bound by arithmetic (64x80x80 -> 64 moves
1.6 MB in 0.4 us and computes 0.47 GFLOP in 0.6 us), 57 in 1x1 layers, bound by memory
(256x80x80 -> 128: 4.9 MB, 1.1 us). What the border adds: 1 to 10 % (see `layout`).
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
    to_output,
)
from yolov7.kernels.runtime import begin, tl, triton


@triton.jit
def _tma_sum(
    # Tensors
    x_desc,  # [rows, c_in], blocks [BLOCK_M, BLOCK_K]
    weight_desc,  # [n_out, KERNEL * KERNEL * c_in], blocks [BLOCK_N, BLOCK_K]
    # Shapes
    row,
    column,
    split,
    shape,  # Geometry
    # Constexprs
    KERNEL: tl.constexpr,
    PRECISION: tl.constexpr,
    PROMOTE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One split's sum over taps and channels for the tile at ``row``, ``column``."""
    first, steps, tap, k = split_steps(shape.c_in, split, KERNEL, SPLIT_K, BLOCK_K)
    acc = no_sum(x_desc.dtype, BLOCK_M, BLOCK_N)
    for _ in tl.range(first, steps):
        a = x_desc.load([row + tap_shift(tap, shape, KERNEL), k])
        b = weight_desc.load([column, tap * shape.c_in + k])
        acc = multiply(a, b.T, acc, PRECISION, PROMOTE)
        tap, k = next_step(tap, k, shape.c_in, KERNEL, BLOCK_K)
    return acc


@triton.jit
def _tma_layer(
    # Tensors
    x_desc,
    weight_desc,
    scale_ptr,  # [n_out] fp32 or None
    bias_ptr,  # [n_out] fp32
    residual_ptr,  # [rows, n_out] or None
    out,  # descriptor [rows, n_out], blocks [BLOCK_M, BLOCK_N]; a pointer when UPSAMPLE
    partial_ptr,  # [SPLIT_K, rows, n_out] fp32 or None
    # Shapes
    first_tile,
    shape,  # Geometry
    # Scalars
    scales,
    # Constexprs
    KERNEL: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PROMOTE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Every ``num_programs``-th tile of one layer, from ``first_tile`` on."""
    tiles_n = tl.cdiv(shape.n_out, BLOCK_N)
    tiles_m = tl.cdiv(shape.rows, BLOCK_M)
    tiles = tiles_m * tiles_n * SPLIT_K
    for tile in tl.range(first_tile, tiles, tl.num_programs(0), flatten=FLATTEN):
        split = tile // (tiles_m * tiles_n)
        row = tile // tiles_n % tiles_m * BLOCK_M
        column = tile % tiles_n * BLOCK_N
        acc = _tma_sum(
            x_desc, weight_desc, row, column, split, shape,
            KERNEL, PRECISION, PROMOTE, SPLIT_K, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        offs_m = row + tl.arange(0, BLOCK_M)
        offs_n = column + tl.arange(0, BLOCK_N)
        if SPLIT_K > 1:
            store_partial(partial_ptr, acc, split, offs_m, offs_n, shape)
        else:
            acc = finish(
                acc, scale_ptr, bias_ptr, residual_ptr, offs_m, offs_n, shape, scales, ACTIVATION
            )
            if UPSAMPLE:
                store_rows(out, acc, offs_m, offs_n, shape, scales, True)
            else:
                out.store([row, column], to_output(acc, offs_m, shape, scales, out.dtype))


@triton.jit
def conv_tma_kernel(
    # Tensors of up to three layers, None where GROUPS is less (descriptors fit in no tuple)
    x_desc_0,
    x_desc_1,
    x_desc_2,
    weight_desc_0,
    weight_desc_1,
    weight_desc_2,
    out_0,
    out_1,
    out_2,
    # Tensors, one of each per layer
    weight_ptrs,
    scale_ptrs,
    bias_ptrs,
    residual_ptrs,
    partial_ptrs,
    # Shapes, a Geometry per layer
    shapes,
    # Scalars, Scales per layer
    scales,
    # Constexprs
    GROUPS: tl.constexpr,
    KERNEL: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PROMOTE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    FLATTEN: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """The tiles of all layers of the group, dealt to the programs in turn."""
    x_descs = (x_desc_0, x_desc_1, x_desc_2)
    weight_descs = (weight_desc_0, weight_desc_1, weight_desc_2)
    outs = (out_0, out_1, out_2)
    for g in tl.static_range(GROUPS):
        ask_for_weights(weight_ptrs[g], shapes[g].n_out * KERNEL * KERNEL * shapes[g].c_in, PDL)
    begin(PDL)
    programs = tl.num_programs(0)
    first_tile = tl.program_id(0)
    for g in tl.static_range(GROUPS):
        _tma_layer(
            x_descs[g], weight_descs[g], scale_ptrs[g], bias_ptrs[g], residual_ptrs[g], outs[g],
            partial_ptrs[g], first_tile, shapes[g], scales[g],
            KERNEL, UPSAMPLE, ACTIVATION, PRECISION, PROMOTE, SPLIT_K, FLATTEN,
            BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        # The next layer's first tile goes to the program after the one of this layer's last.
        tiles = layer_tiles(shapes[g], SPLIT_K, BLOCK_M, BLOCK_N)
        first_tile = (first_tile + programs - tiles % programs) % programs
