"""The kernels of batch norm and activation, over matrices [M, C] with contiguous channels.

Programs own BLOCK_M rows x BLOCK_C channels, or for sums `rows` rows of BLOCK_C channels; the parts
that those leave are merged, or added, in a fixed order.
"""

from yolov7.kernels.runtime import tl, triton


@triton.jit
def stats_kernel(
    # Tensors
    x_ptr,  # [M, C]
    parts_ptr,  # [parts, 3, C] fp32: count, mean, sum of squared deviations
    # Shapes
    M,
    C,
    rows,  # of a part
    # Constexprs
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics of `rows` rows."""
    part = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    start = part.to(tl.int64) * rows
    end = tl.minimum(start + rows, M)
    shift = tl.load(x_ptr + start * C + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    square = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    # Two stages: the next rows are on their way while these are added.
    for first in tl.range(start, end, BLOCK_M, num_stages=2):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask = (offs_m < end)[:, None] & mask_c[None, :]
        x = tl.load(x_ptr + offs_m[:, None] * C + offs_c[None, :], mask=mask, other=0.0)
        away = tl.where(mask, x.to(tl.float32) - shift[None, :], 0.0)
        total += away
        square += away * away
    count = (end - start).to(tl.float32)
    mean = tl.sum(total, axis=0) / count
    deviation = tl.maximum(tl.sum(square, axis=0) - count * mean * mean, 0.0)
    out_ptrs = parts_ptr + part * 3 * C + offs_c
    tl.store(out_ptrs, tl.zeros([BLOCK_C], tl.float32) + count, mask=mask_c)
    tl.store(out_ptrs + C, mean + shift, mask=mask_c)
    tl.store(out_ptrs + 2 * C, deviation, mask=mask_c)


@triton.jit
def merge_kernel(
    # Tensors
    parts_ptr,  # [parts, 3, C] fp32
    stats_ptr,  # [3, C] fp32
    running_mean_ptr,  # [C] fp32 or None
    running_var_ptr,  # [C] fp32 or None
    # Shapes
    parts,
    C,
    # Scalars
    momentum,
    # Constexprs
    BLOCK_S: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Statistics of all parts together; the running ones move towards them."""
    offs_s = tl.arange(0, BLOCK_S)
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_s < parts)[:, None] & mask_c[None, :]
    ptrs = parts_ptr + offs_s[:, None] * 3 * C + offs_c[None, :]
    counts = tl.load(ptrs, mask=mask, other=0.0)
    means = tl.load(ptrs + C, mask=mask, other=0.0)
    squares = tl.load(ptrs + 2 * C, mask=mask, other=0.0)
    count = tl.maximum(tl.sum(counts, axis=0), 1.0)
    # Means are averaged about the first one: a large mean costs no digits.
    first = tl.load(parts_ptr + C + offs_c, mask=mask_c, other=0.0)
    mean = first + tl.sum(counts * (means - first[None, :]), axis=0) / count
    away = means - mean[None, :]
    square = tl.sum(squares + counts * away * away, axis=0)
    tl.store(stats_ptr + offs_c, count, mask=mask_c)
    tl.store(stats_ptr + C + offs_c, mean, mask=mask_c)
    tl.store(stats_ptr + 2 * C + offs_c, square, mask=mask_c)
    if running_mean_ptr is not None:
        variance = square / tl.maximum(count - 1.0, 1.0)
        old = tl.load(running_mean_ptr + offs_c, mask=mask_c, other=0.0)
        tl.store(running_mean_ptr + offs_c, old + momentum * (mean - old), mask=mask_c)
        old = tl.load(running_var_ptr + offs_c, mask=mask_c, other=0.0)
        tl.store(running_var_ptr + offs_c, old + momentum * (variance - old), mask=mask_c)


@triton.jit
def _load_affine(stats_ptr, weight_ptr, bias_ptr, offs_c, C, eps):
    """Per channel: count, mean, 1 / sqrt(var + eps), weight, bias."""
    mask = offs_c < C
    count = tl.load(stats_ptr + offs_c, mask=mask, other=1.0)
    mean = tl.load(stats_ptr + C + offs_c, mask=mask, other=0.0)
    square = tl.load(stats_ptr + 2 * C + offs_c, mask=mask, other=0.0)
    weight = tl.load(weight_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_c, mask=mask, other=0.0).to(tl.float32)
    return count, mean, 1.0 / tl.sqrt_rn(square / count + eps), weight, bias


@triton.jit
def _dz(dy, xn, weight, bias, ACTIVATION: tl.constexpr):
    """The gradient before the activation."""
    z = xn * weight[None, :] + bias[None, :]
    if ACTIVATION == "silu":
        s = 1.0 / (1.0 + tl.exp(-z))
        dy *= s * (1.0 + z * (1.0 - s))
    elif ACTIVATION == "leaky_relu":
        dy *= tl.where(z > 0, 1.0, 0.1)
    return dy


@triton.jit
def forward_kernel(
    # Tensors
    x_ptr,  # [M, C]
    stats_ptr,  # [3, C] fp32
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    y_ptr,  # [M, C]
    # Shapes
    M,
    C,
    # Scalars
    eps,
    # Constexprs
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_M rows x BLOCK_C channels of y."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (offs_m < M)[:, None] & (offs_c < C)[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    _, mean, inverse, weight, bias = _load_affine(stats_ptr, weight_ptr, bias_ptr, offs_c, C, eps)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    z = (x - mean[None, :]) * inverse[None, :] * weight[None, :] + bias[None, :]
    if ACTIVATION == "silu":
        z = z / (1.0 + tl.exp(-z))
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, 0.1 * z)
    tl.store(y_ptr + offs, z.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def sums_kernel(
    # Tensors
    dy_ptr,  # [M, C]
    x_ptr,  # [M, C]
    stats_ptr,  # [3, C] fp32
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    parts_ptr,  # [parts, 2, C] fp32
    # Shapes
    M,
    C,
    rows,  # of a part
    # Scalars
    eps,
    # Constexprs
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Sums of dz and of dz xn over `rows` rows."""
    part = tl.program_id(0)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    start = part.to(tl.int64) * rows
    end = tl.minimum(start + rows, M)
    _, mean, inverse, weight, bias = _load_affine(stats_ptr, weight_ptr, bias_ptr, offs_c, C, eps)
    sum_dz = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    sum_dz_xn = tl.zeros([BLOCK_M, BLOCK_C], tl.float32)
    for first in range(start, end, BLOCK_M):
        offs_m = first + tl.arange(0, BLOCK_M)
        mask = (offs_m < end)[:, None] & mask_c[None, :]
        offs = offs_m[:, None] * C + offs_c[None, :]
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        xn = (x - mean[None, :]) * inverse[None, :]
        dz = _dz(dy, xn, weight, bias, ACTIVATION)
        sum_dz += dz
        sum_dz_xn += dz * xn
    out_ptrs = parts_ptr + part * 2 * C + offs_c
    tl.store(out_ptrs, tl.sum(sum_dz, axis=0), mask=mask_c)
    tl.store(out_ptrs + C, tl.sum(sum_dz_xn, axis=0), mask=mask_c)


@triton.jit
def backward_kernel(
    # Tensors
    dy_ptr,  # [M, C]
    x_ptr,  # [M, C]
    stats_ptr,  # [3, C] fp32
    weight_ptr,  # [C]
    bias_ptr,  # [C]
    sums_ptr,  # [2, C] fp32, or None: the statistics do not depend on x
    dx_ptr,  # [M, C]
    # Shapes
    M,
    C,
    # Scalars
    eps,
    # Constexprs
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """BLOCK_M rows x BLOCK_C channels of dx."""
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    mask = (offs_m < M)[:, None] & mask_c[None, :]
    offs = offs_m[:, None] * C + offs_c[None, :]
    count, mean, inverse, weight, bias = _load_affine(
        stats_ptr, weight_ptr, bias_ptr, offs_c, C, eps
    )
    dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    xn = (x - mean[None, :]) * inverse[None, :]
    dx = _dz(dy, xn, weight, bias, ACTIVATION)
    if sums_ptr is not None:
        mean_dz = tl.load(sums_ptr + offs_c, mask=mask_c, other=0.0) / count
        mean_dz_xn = tl.load(sums_ptr + C + offs_c, mask=mask_c, other=0.0) / count
        dx -= mean_dz[None, :] + xn * mean_dz_xn[None, :]
    dx *= (inverse * weight)[None, :]
    tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
