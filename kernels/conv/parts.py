"""What the convolution kernels share: geometry, the start, the product, what follows."""

from typing import NamedTuple

from yolov7.kernels.runtime import AMD, INTERPRET, begin, tl, triton

INTERPRETED = tl.constexpr(INTERPRET)
PLAIN = tl.constexpr(INTERPRET or AMD)  # without NVIDIA's assembly


class Geometry(NamedTuple):
    """Sizes of a layer as the kernels take them; see `yolov7.kernels.layout` for the maps.

    The computed map is the target, or the source before an upsample: `rows` of it are computed.
    """

    rows: int
    h: int
    w: int
    pitch: int
    row_pitch: int
    c_in: int
    n_out: int
    source_rows: int
    source_pitch: int
    source_row_pitch: int
    target_pitch: int
    target_row_pitch: int
    x_stride: int  # from one row of the matrix to the next
    residual_stride: int
    out_stride: int


class Scales(NamedTuple):
    """What one unit of a residual and of an output of 8 bits stands for."""

    residual: float
    out: float


@triton.jit
def ask_for_weights(
    weight_ptr,  # [n_out, length]
    elements,
    PDL: tl.constexpr,
):
    """Bring this program's share of a layer's weights from memory to the L2 cache.

    They depend on no kernel, so this comes before the wait for the one before: programs that stand
    ready spend it so. Of a network larger than that cache each launch would else begin by waiting
    for its weights.
    """
    if PDL:
        LINE: tl.constexpr = 1024 // weight_ptr.dtype.element_ty.primitive_bitwidth  # 128 bytes
        share = 256 * LINE
        for start in range(tl.program_id(0) * share, elements, tl.num_programs(0) * share):
            offs = tl.minimum(start + tl.arange(0, 256) * LINE, elements - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.b32 $0, 0;",
                "=r,l",
                [(weight_ptr + offs).to(tl.int64)],
                dtype=tl.int32,
                is_pure=False,
                pack=1,
            )


@triton.jit
def layer_tiles(shape, SPLIT_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of one layer, each split's apart."""
    return tl.cdiv(shape.rows, BLOCK_M) * tl.cdiv(shape.n_out, BLOCK_N) * SPLIT_K


@triton.jit
def split_steps(c_in, split, KERNEL: tl.constexpr, SPLIT_K: tl.constexpr, BLOCK_K: tl.constexpr):
    """A split's first step and the one after its last, and the first one's tap and channel.

    A step is a tap and a block of channels, the taps one after the other. Without a split nothing
    is computed from it, or the Hopper kernel's loops do not flatten.
    """
    blocks_k = tl.cdiv(c_in, BLOCK_K)
    steps = KERNEL * KERNEL * blocks_k
    first = 0
    tap = 0
    k = 0
    if SPLIT_K > 1:
        per_split = tl.cdiv(steps, SPLIT_K)
        first = split * per_split
        steps = tl.minimum(first + per_split, steps)
        tap = first // blocks_k
        k = first % blocks_k * BLOCK_K
    return first, steps, tap, k


@triton.jit
def tap_shift(tap, shape, KERNEL: tl.constexpr):
    """Rows from the pixel under the kernel's centre to the one under a tap."""
    return (tap // KERNEL - KERNEL // 2) * shape.source_pitch + tap % KERNEL - KERNEL // 2


@triton.jit
def next_step(tap, k, c_in, KERNEL: tl.constexpr, BLOCK_K: tl.constexpr):
    """Tap and channel of the step after this one, carried along: a division costs a product."""
    k += BLOCK_K
    if KERNEL > 1:
        last = k >= c_in
        tap = tl.where(last, tap + 1, tap)
        k = tl.where(last, 0, k)
    return tap, k


@triton.jit
def no_sum(DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """What sums of products of a type begin with."""
    return tl.zeros((BLOCK_M, BLOCK_N), tl.int32 if DTYPE.is_int8() else tl.float32)


@triton.jit
def multiply(a, b, acc, PRECISION: tl.constexpr, PROMOTE: tl.constexpr):
    """``acc + a @ b``, of int8 in int32.

    Hopper sums fp8 products with about 14 bits; under PROMOTE every block is summed apart and
    added in fp32. The interpreter lacks bf16 and multiplies it as fp32.
    """
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    if a.dtype == tl.int8:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    elif PROMOTE:
        acc = tl.dot(a, b, acc, max_num_imprecise_acc=a.shape[1])
    else:
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    return acc


@triton.jit
def fast_silu(x):
    """``x sigmoid(x) = x / 2 (1 + tanh(x / 2))``, with the hardware's tanh on a GPU.

    An exponential and a reciprocal are two of the 16 special functions that a processor computes
    per cycle: 4096 cycles for a tile of 128 x 256, half a 1x1 layer's time; tanh is one. Its error,
    at most 2^-11 of 1, makes one of |x| 2^-12: half of what rounding x to fp16 makes.
    """
    if PLAIN:
        return x / (1.0 + tl.exp(-x))
    half = 0.5 * x
    tanh = tl.inline_asm_elementwise(
        "tanh.approx.f32 $0, $1;", "=f,f", [half], dtype=tl.float32, is_pure=True, pack=1
    )
    return half + half * tanh


@triton.jit
def finish(
    # Tensors
    acc,  # [BLOCK_M, BLOCK_N] fp32, or int32 of int8 products
    scale_ptr,  # [n_out] fp32 or None
    bias_ptr,  # [n_out] fp32
    residual_ptr,  # [rows, n_out] or None
    # Shapes
    offs_m,  # [BLOCK_M]
    offs_n,  # [BLOCK_N]
    shape,  # Geometry
    # Scalars
    scales,  # Scales
    # Constexprs
    ACTIVATION: tl.constexpr,
):
    """``act(acc * scale + bias) + residual``, whatever it is in the border."""
    mask_n = offs_n < shape.n_out
    acc = acc.to(tl.float32)
    if scale_ptr is not None:
        acc *= tl.load(scale_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if ACTIVATION == "silu":
        acc = acc / (1.0 + tl.exp(-acc))
    elif ACTIVATION == "fast_silu":
        acc = fast_silu(acc)
    elif ACTIVATION == "leaky_relu":
        acc = tl.maximum(acc, 0.1 * acc)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + offs_m.to(tl.int64)[:, None] * shape.residual_stride
        residual_ptrs += offs_n[None, :]
        mask = (offs_m < shape.rows)[:, None] & mask_n[None, :]
        residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        acc += residual * scales.residual
    return acc


@triton.jit
def to_output(
    acc,  # [BLOCK_M, BLOCK_N] fp32
    offs_m,  # [BLOCK_M]
    shape,  # Geometry
    scales,  # Scales
    DTYPE: tl.constexpr,
):
    """The accumulator in the output's type, zero in the border.

    8 bits are in units of their scale and saturate. int8 is the last byte of the number plus
    1.5 x 2^23, whose last place is 1: the addition rounds to even at a full rate, which the
    conversion of a quarter of it does not.
    """
    if DTYPE.is_fp8():
        acc = tl.clamp(acc / scales.out, -448.0, 448.0)
    elif DTYPE.is_int8():
        acc = tl.clamp(acc / scales.out, -127.0, 127.0) + 12582912.0
        acc = acc.to(tl.int32, bitcast=True)
    x = offs_m % shape.pitch
    y = offs_m // shape.pitch % shape.row_pitch
    inside = ((x < shape.w) & (y < shape.h))[:, None]
    return _zero_unless(inside, acc.to(DTYPE), DTYPE)


@triton.jit
def _zero_unless(
    inside,  # [BLOCK_M, 1]
    values,  # [BLOCK_M, BLOCK_N]
    DTYPE: tl.constexpr,  # of the values
):
    """The values, zero where they are not inside.

    What lies in the border is no number of the map and may be infinite, so it is not multiplied by
    zero. A selection takes an instruction an element and undoes the packing of two or four into a
    register; an "and" of whole registers does not (of int8 it is no gain). Counted on sm_90, of a
    1x1 layer with SiLU in fp16: 7.0 instructions an element instead of the selection's 8.5, 11.25
    instead of 14.5 where tiles overlap; with LeakyReLU 5.75 instead of 7.25.
    """
    if DTYPE.primitive_bitwidth == 32 or DTYPE.is_int8() or PLAIN:
        values = tl.where(inside, values, 0.0).to(DTYPE)
    elif DTYPE.primitive_bitwidth == 16:
        kept = tl.broadcast_to(tl.where(inside, -1, 0).to(tl.int16), values.shape)
        values = _both(values.to(tl.int16, bitcast=True), kept, 2).to(DTYPE, bitcast=True)
    else:
        kept = tl.broadcast_to(tl.where(inside, -1, 0).to(tl.int8), values.shape)
        values = _both(values.to(tl.int8, bitcast=True), kept, 4).to(DTYPE, bitcast=True)
    return values


@triton.jit
def _both(a, b, PACK: tl.constexpr):
    """``a & b``, so many elements at once."""
    return tl.inline_asm_elementwise(
        "and.b32 $0, $1, $2;", "=r,r,r", [a, b], dtype=a.dtype, is_pure=True, pack=PACK
    )


@triton.jit
def store_rows(
    out_ptr,  # [target rows, n_out]
    acc,  # [BLOCK_M, BLOCK_N] fp32
    offs_m,  # [BLOCK_M]
    offs_n,  # [BLOCK_N]
    shape,  # Geometry
    scales,  # Scales
    UPSAMPLE: tl.constexpr,
):
    """Store a tile by pointers, once, or to the 2x2 pixels that upsampling makes of each."""
    values = to_output(acc, offs_m, shape, scales, out_ptr.dtype.element_ty)
    mask = (offs_m < shape.rows)[:, None] & (offs_n < shape.n_out)[None, :]
    if UPSAMPLE:
        line = offs_m // shape.pitch
        for corner in tl.static_range(4):
            y = line % shape.row_pitch * 2 + corner // 2
            x = offs_m % shape.pitch * 2 + corner % 2
            row = (line // shape.row_pitch * shape.target_row_pitch + y) * shape.target_pitch + x
            held = (y < shape.target_row_pitch) & (x < shape.target_pitch)
            out_ptrs = out_ptr + row.to(tl.int64)[:, None] * shape.out_stride + offs_n[None, :]
            tl.store(out_ptrs, values, mask=mask & held[:, None])
    else:
        out_ptrs = out_ptr + offs_m.to(tl.int64)[:, None] * shape.out_stride + offs_n[None, :]
        tl.store(out_ptrs, values, mask=mask)


@triton.jit
def store_partial(
    partial_ptr,  # [SPLIT_K, rows, n_out] fp32 or int32
    acc,  # [BLOCK_M, BLOCK_N] likewise
    split,
    offs_m,  # [BLOCK_M]
    offs_n,  # [BLOCK_N]
    shape,  # Geometry
):
    """Store one split's share of the sum."""
    row = split.to(tl.int64) * shape.rows + offs_m
    mask = (offs_m < shape.rows)[:, None] & (offs_n < shape.n_out)[None, :]
    tl.store(partial_ptr + row[:, None] * shape.n_out + offs_n[None, :], acc, mask=mask)


@triton.jit
def _reduce_tile(
    # Tensors
    partial_ptr,  # [SPLIT_K, rows, n_out] fp32 or int32
    scale_ptr,  # [n_out] fp32 or None
    bias_ptr,  # [n_out] fp32
    residual_ptr,  # [rows, n_out] or None
    out_ptr,  # [target rows, n_out]
    # Shapes
    shape,  # Geometry
    # Scalars
    scales,  # Scales
    # Constexprs
    ACTIVATION: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One tile of one layer: the sum of the splits' shares, finished."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m < shape.rows)[:, None] & (offs_n < shape.n_out)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_N), partial_ptr.dtype.element_ty)
    for split in tl.static_range(SPLIT_K):
        row = offs_m.to(tl.int64) + split * shape.rows
        partial_ptrs = partial_ptr + row[:, None] * shape.n_out + offs_n[None, :]
        acc += tl.load(partial_ptrs, mask=mask, other=0)
    acc = finish(acc, scale_ptr, bias_ptr, residual_ptr, offs_m, offs_n, shape, scales, ACTIVATION)
    store_rows(out_ptr, acc, offs_m, offs_n, shape, scales, UPSAMPLE)


@triton.jit
def conv_reduce_kernel(
    # Tensors, one of each per layer of the group
    partial_ptrs,
    scale_ptrs,
    bias_ptrs,
    residual_ptrs,
    out_ptrs,
    # Shapes, a Geometry per layer
    shapes,
    # Scalars, Scales per layer
    scales,
    # Constexprs
    GROUPS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    UPSAMPLE: tl.constexpr,
    SPLIT_K: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Add the splits' shares, always in the same order, and finish the convolutions.

    The grid has a plane for each layer, of the largest one's size.
    """
    begin(PDL)
    for g in tl.static_range(GROUPS):
        if tl.program_id(2) == g:
            _reduce_tile(
                partial_ptrs[g], scale_ptrs[g], bias_ptrs[g], residual_ptrs[g], out_ptrs[g],
                shapes[g], scales[g], ACTIVATION, UPSAMPLE, SPLIT_K, BLOCK_M, BLOCK_N,
            )  # fmt: skip
