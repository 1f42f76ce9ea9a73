"""The kernel of the detection head: a segment of pixels, an anchor and an image a program."""

from typing import Any, NamedTuple

from yolov7.kernels.runtime import begin, tl, triton


class Level(NamedTuple):
    """Where a level's pixels lie, and where its rows go."""

    height: int
    width: int
    pitch: int
    row_pitch: int
    c_in: int
    x_stride: int
    stride: int  # pixels of the image per pixel
    first: int  # the row, or the segment, that its first one becomes


class Anchor(NamedTuple):
    """One anchor of a level and the weights of its outputs."""

    weight_ptr: Any  # [anchors * outputs, c_in]
    bias_ptr: Any  # [anchors * outputs] fp32
    size_ptr: Any  # [2] fp32, width and height
    index: Any


@triton.jit
def _sigmoids(
    # Tensors
    x_ptrs,  # [BLOCK_M] rows of the map
    anchor,
    # Shapes
    channel,  # [BLOCK_N]
    mask_m,
    mask_n,
    level,
    outputs,
    # Constexprs
    PRECISION: tl.constexpr,
    PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """What the head's convolution gives, through the sigmoid: [BLOCK_M, BLOCK_N]."""
    offs_n = anchor.index * outputs + channel
    weight_ptrs = anchor.weight_ptr + offs_n[None, :] * level.c_in
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for start_k in range(0, level.c_in, BLOCK_K):
        offs_k = start_k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < level.c_in
        a_mask, b_mask = mask_m[:, None] & mask_k[None, :], mask_k[:, None] & mask_n[None, :]
        a = tl.load(x_ptrs[:, None] + offs_k[None, :], mask=a_mask, other=0.0)
        b = tl.load(weight_ptrs + offs_k[:, None], mask=b_mask, other=0.0)
        if PROMOTE:  # the interpreter has no bf16
            a, b = a.to(tl.float32), b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    acc += tl.load(anchor.bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    return 1.0 / (1.0 + tl.exp(-acc))


@triton.jit
def _boxes(s, channel, column, row, anchor_w, anchor_h, level):
    """Sigmoids as centre and size in pixels where the channel is one of those, else themselves."""
    grid = tl.where((channel == 0)[None, :], column[:, None], row[:, None])
    centre = (2.0 * s - 0.5 + grid.to(tl.float32)) * level.stride
    size = 4.0 * s * s * tl.where(channel == 2, anchor_w, anchor_h)[None, :]
    value = tl.where((channel < 4)[None, :], size, s)
    return tl.where((channel < 2)[None, :], centre, value)


@triton.jit
def _decode_tile(
    # Tensors
    x_ptr,  # [rows of the map, c_in]
    anchor,  # Anchor
    rows_ptr,  # [B, total, outputs] fp32
    counts_ptr,  # [B, segments] int32 or None
    # Shapes
    tile,
    image,
    level,  # Level
    total,
    segments,
    outputs,
    # Scalars
    conf,
    # Constexprs
    PRECISION: tl.constexpr,
    PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """BLOCK_M pixels of a level with one anchor: a segment of the candidate form."""
    pixels = level.height * level.width
    pixel = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    mask_m = pixel < pixels
    column, row = pixel % level.width, pixel // level.width
    x_rows = (image * level.row_pitch + row) * level.pitch + column  # image is int64
    x_ptrs = x_ptr + x_rows * level.x_stride
    place = level.first + anchor.index * pixels + pixel
    anchor_w, anchor_h = tl.load(anchor.size_ptr), tl.load(anchor.size_ptr + 1)
    for start_n in range(0, outputs, BLOCK_N):
        channel = start_n + tl.arange(0, BLOCK_N)
        mask_n = channel < outputs
        s = _sigmoids(
            x_ptrs, anchor, channel, mask_m, mask_n, level, outputs,
            PRECISION, PROMOTE, BLOCK_M, BLOCK_N, BLOCK_K,
        )  # fmt: skip
        value = _boxes(s, channel, column, row, anchor_w, anchor_h, level)
        if counts_ptr is not None and start_n == 0:
            # Survivors move to the start of their segment, in order; the others are not stored.
            objectness = tl.sum(tl.where((channel == 4)[None, :], s, 0.0), axis=1)
            mask_m &= objectness > conf
            rank = tl.cumsum(mask_m.to(tl.int32), axis=0)
            segment = level.first + anchor.index * tl.cdiv(pixels, BLOCK_M) + tile
            place = segment * BLOCK_M + rank - 1
            # Not a sum: reducing to a scalar here fails to compile for sm_100 (Triton 3.6, 3.7).
            last = tl.arange(0, BLOCK_M) == BLOCK_M - 1
            count_ptr = counts_ptr + image * segments + segment
            tl.store(count_ptr + tl.zeros([BLOCK_M], tl.int32), rank, mask=last)
        out_ptrs = rows_ptr + (image * total + place)[:, None] * outputs + channel[None, :]
        tl.store(out_ptrs, value, mask=mask_m[:, None] & mask_n[None, :])


@triton.jit
def decode_kernel(
    # Tensors, one of each per level
    x_ptrs,
    weight_ptrs,
    bias_ptrs,
    # Tensors
    anchors_ptr,  # [LEVELS, anchors, 2] fp32
    rows_ptr,  # [B, total, outputs] fp32
    counts_ptr,  # [B, segments] int32 or None
    # Shapes
    levels,  # a Level each
    anchors,
    total,
    segments,
    outputs,
    # Scalars
    conf,
    # Constexprs
    LEVELS: tl.constexpr,
    PRECISION: tl.constexpr,
    PROMOTE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PDL: tl.constexpr,
):
    """One segment of pixels, one anchor, one image a program; the levels one after the other."""
    begin(PDL)
    tile = tl.program_id(0)
    index = tl.program_id(1)
    image = tl.program_id(2).to(tl.int64)
    for i in tl.static_range(LEVELS):
        tiles = tl.cdiv(levels[i].height * levels[i].width, BLOCK_M)
        if (tile >= 0) & (tile < tiles):
            size_ptr = anchors_ptr + (i * anchors + index) * 2
            anchor = Anchor(weight_ptrs[i], bias_ptrs[i], size_ptr, index)
            _decode_tile(
                x_ptrs[i], anchor, rows_ptr, counts_ptr,
                tile, image, levels[i], total, segments, outputs, conf,
                PRECISION, PROMOTE, BLOCK_M, BLOCK_N, BLOCK_K,
            )  # fmt: skip
        tile -= tiles
