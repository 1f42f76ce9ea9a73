"""Choosing an image's best candidates on the device: histogram, selection, scatter.

A candidate is one int64 key: the bits of its score (positive floats order as integers), then
2^31 - 1 - (row * nc + class), so that the larger key is the better candidate and no two are equal.

`nms_histogram_kernel` counts the keys above `conf` in bins of equal width over the bits of
conf..1, each program in its own histogram, which it clears itself. `nms_select_kernel` sums them,
finds the bin in which the `max_candidates`-th key lies, and with it the lowest key to take, and
where each bin starts. If that bin is too full for the buffer (a great many equal scores), it is cut
into bins again, down to single keys: what is taken never depends on the order of arrival.
`nms_scatter_kernel` writes the keys taken, bin after bin; within a bin their order is arbitrary
and nothing that follows depends on it.
"""

from yolov7.kernels.runtime import tl, triton


@triton.jit
def open_rows(
    # Tensors
    prediction_ptr,  # [B, N, 5 + NC]
    counts_ptr,  # [B, N / segment] int32
    # Rows
    image,  # int64
    rows,  # [R] int32
    # Scalars
    N,
    segment,
    conf,
    # Constexprs
    NC: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
):
    """Pointers to the rows, their objectness, and whether it exceeds `conf`: [R] each."""
    row_ptrs = prediction_ptr + (image * N + rows) * (5 + NC)
    mask = rows < N
    if HAS_COUNTS:
        count_ptrs = counts_ptr + image * (N // segment) + rows // segment
        mask &= rows % segment < tl.load(count_ptrs, mask=mask, other=0)
    objectness = tl.load(row_ptrs + 4, mask=mask, other=0.0).to(tl.float32)
    return row_ptrs, objectness, mask & (objectness > conf)


@triton.jit
def corners(row_ptrs, mask):
    """x1, y1, x2, y2 of rows, [R] fp32 each."""
    x = tl.load(row_ptrs + 0, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(row_ptrs + 1, mask=mask, other=0.0).to(tl.float32)
    half_w = tl.load(row_ptrs + 2, mask=mask, other=0.0).to(tl.float32) * 0.5
    half_h = tl.load(row_ptrs + 3, mask=mask, other=0.0).to(tl.float32) * 0.5
    return x - half_w, y - half_h, x + half_w, y + half_h


@triton.jit
def candidate_keys(
    # Tensors
    row_ptrs,  # [R]
    objectness,  # [R] fp32
    passing,  # [R] bool
    wanted,  # [BLOCK_C] bool
    # Rows
    rows,  # [R] int32
    # Scalars
    conf,
    # Constexprs
    NC: tl.constexpr,
    MULTI_LABEL: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Keys [R, BLOCK_C] int64 of the candidates of these rows, -1 where there is none."""
    offs_c = tl.arange(0, BLOCK_C)
    x1, y1, x2, y2 = corners(row_ptrs, passing)
    finite = (tl.abs(x1) < float("inf")) & (tl.abs(y1) < float("inf"))
    finite &= (tl.abs(x2) < float("inf")) & (tl.abs(y2) < float("inf"))
    mask = (passing & finite)[:, None] & (offs_c < NC)[None, :]
    if NC == 1:
        scores = tl.broadcast_to(objectness[:, None], mask.shape)
    else:
        probability = tl.load(row_ptrs[:, None] + 5 + offs_c[None, :], mask=mask, other=0.0)
        scores = probability.to(tl.float32) * objectness[:, None]
    scores = tl.where(mask & (scores > conf), scores, -1.0)  # NaN > conf is false
    if not MULTI_LABEL:
        best = tl.argmax(scores, axis=1)  # the first of equals
        scores = tl.where(offs_c[None, :] == best[:, None], scores, -1.0)
    index = rows[:, None] * NC + offs_c[None, :]
    bits = scores.to(tl.int32, bitcast=True).to(tl.int64)
    keys = (bits << 32) | (0x7FFFFFFF - index).to(tl.int64)
    return tl.where((scores > conf) & wanted[None, :], keys, -1)


@triton.jit
def wanted_classes(
    classes_ptr,  # [K]
    K,
    HAS_CLASSES: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Which classes are asked for: [BLOCK_C] bool."""
    offs_c = tl.arange(0, BLOCK_C)
    wanted = offs_c >= 0
    if HAS_CLASSES:
        offs_k = tl.arange(0, BLOCK_K)
        classes = tl.load(classes_ptr + offs_k, mask=offs_k < K, other=-1).to(tl.int32)
        wanted = tl.max((offs_c[:, None] == classes[None, :]).to(tl.int32), axis=1) > 0
    return wanted


@triton.jit
def key_of_bits(bits):
    """The lowest key of a score with these bits."""
    return (tl.full([], 0, tl.int64) + bits) << 32


@triton.jit
def nms_histogram_kernel(
    # Tensors
    prediction_ptr,  # [B, N, 5 + NC]
    counts_ptr,  # [B, N / segment] int32
    classes_ptr,  # [K]
    histogram_ptr,  # [B, SPLITS, 2^LOG_BINS] int32
    # Shapes
    N,
    K,
    # Scalars
    segment,
    conf,
    conf_bits,  # of its fp32
    shift,  # log2 of the keys per bin
    # Constexprs
    NC: tl.constexpr,
    MULTI_LABEL: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_CLASSES: tl.constexpr,
    LOG_BINS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Count the candidates of every SPLITS-th block of rows by key, best bin first."""
    BINS: tl.constexpr = 1 << LOG_BINS
    pid_split = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    bins_ptr = histogram_ptr + (image * SPLITS + pid_split) * BINS
    tl.store(bins_ptr + tl.arange(0, BINS), 0)
    tl.debug_barrier()
    wanted = wanted_classes(classes_ptr, K, HAS_CLASSES, BLOCK_C, BLOCK_K)
    for start in range(pid_split * BLOCK_R, N, SPLITS * BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        row_ptrs, objectness, passing = open_rows(
            prediction_ptr, counts_ptr, image, rows, N, segment, conf, NC, HAS_COUNTS
        )
        if tl.max(passing.to(tl.int32), axis=0) > 0:
            keys = candidate_keys(
                row_ptrs, objectness, passing, wanted, rows, conf, NC, MULTI_LABEL, BLOCK_C
            )
            bins = BINS - 1 - tl.minimum((keys - key_of_bits(conf_bits)) >> shift, BINS - 1)
            tl.atomic_add(bins_ptr + bins, 1, mask=keys >= 0, sem="relaxed")


@triton.jit
def nms_select_kernel(
    # Tensors
    prediction_ptr,  # [B, N, 5 + NC]
    counts_ptr,  # [B, N / segment] int32
    classes_ptr,  # [K]
    histogram_ptr,  # [B, SPLITS, 2^LOG_BINS] int32
    cursor_ptr,  # [B, 2^LOG_BINS] int32
    limits_ptr,  # [B, 2] int64: the lowest key taken, the number taken
    overflow_ptr,  # [B] int32
    # Shapes
    N,
    K,
    # Scalars
    segment,
    conf,
    conf_bits,  # of its fp32
    shift,  # log2 of the keys per bin
    max_candidates,
    capacity,
    # Constexprs
    NC: tl.constexpr,
    MULTI_LABEL: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_CLASSES: tl.constexpr,
    LOG_BINS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Choose the lowest key whose candidates and all better ones fit the buffer, per image."""
    BINS: tl.constexpr = 1 << LOG_BINS
    image = tl.program_id(0).to(tl.int64)
    offs_bin = tl.arange(0, BINS)
    bins_ptrs = histogram_ptr + image * SPLITS * BINS + offs_bin
    histogram = tl.zeros([BINS], dtype=tl.int32)
    for split in range(SPLITS):
        histogram += tl.load(bins_ptrs + split * BINS)
    total = tl.sum(histogram, axis=0)
    tl.store(overflow_ptr + image, tl.maximum(total - max_candidates, 0))
    tl.store(cursor_ptr + image * BINS + offs_bin, tl.cumsum(histogram, axis=0) - histogram)

    # The window [low, high) of keys is cut into bins; `above` candidates are better than all of it.
    low = key_of_bits(conf_bits)
    high = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    shift = tl.full([], 0, tl.int32) + shift
    clamped = tl.full([], 1, tl.int32)  # the best bin of the first window has no upper end
    above = tl.full([], 0, tl.int32)
    taken = tl.full([], 0, tl.int32)
    searching = tl.full([], 1, tl.int32)
    wanted = wanted_classes(classes_ptr, K, HAS_CLASSES, BLOCK_C, BLOCK_K)
    while searching > 0:
        inclusive = above + tl.cumsum(histogram, axis=0)
        needed = inclusive - histogram < max_candidates
        last = tl.sum(needed.to(tl.int32), axis=0) - 1
        taken = tl.max(tl.where(needed, inclusive, 0), axis=0)
        low += (BINS - 1 - last).to(tl.int64) << shift
        if taken <= capacity:
            searching = tl.full([], 0, tl.int32)
        else:
            # The last bin alone is too full: cut it into bins and count again.
            above = tl.max(tl.where(needed, inclusive - histogram, 0), axis=0)
            if (clamped > 0) & (last == 0):
                shift = tl.full([], 63 - LOG_BINS, tl.int32)
            else:
                high = low + tl.minimum(tl.full([], 1, tl.int64) << shift, high - low)
                shift = tl.maximum(shift - LOG_BINS, 0)
            clamped = tl.full([], 0, tl.int32)
            tl.debug_barrier()
            tl.store(bins_ptrs, 0)
            tl.debug_barrier()
            for start in range(0, N, BLOCK_R):
                rows = start + tl.arange(0, BLOCK_R)
                row_ptrs, objectness, passing = open_rows(
                    prediction_ptr, counts_ptr, image, rows, N, segment, conf, NC, HAS_COUNTS
                )
                keys = candidate_keys(
                    row_ptrs, objectness, passing, wanted, rows, conf, NC, MULTI_LABEL, BLOCK_C
                )
                bins = BINS - 1 - ((keys - low) >> shift)
                mask = (keys >= low) & (keys < high)
                first_ptr = histogram_ptr + image * SPLITS * BINS
                tl.atomic_add(first_ptr + bins, 1, mask=mask, sem="relaxed")
            tl.debug_barrier()
            histogram = tl.load(bins_ptrs)
    tl.store(limits_ptr + image * 2, low)
    tl.store(limits_ptr + image * 2 + 1, taken.to(tl.int64))


@triton.jit
def nms_scatter_kernel(
    # Tensors
    prediction_ptr,  # [B, N, 5 + NC]
    counts_ptr,  # [B, N / segment] int32
    classes_ptr,  # [K]
    cursor_ptr,  # [B, 2^LOG_BINS] int32
    limits_ptr,  # [B, 2] int64
    keys_ptr,  # [B, capacity] int64
    # Shapes
    N,
    K,
    # Scalars
    segment,
    conf,
    conf_bits,  # of its fp32
    shift,  # log2 of the keys per bin
    capacity,
    # Constexprs
    NC: tl.constexpr,
    MULTI_LABEL: tl.constexpr,
    HAS_COUNTS: tl.constexpr,
    HAS_CLASSES: tl.constexpr,
    LOG_BINS: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Write the keys that were chosen, bin after bin, in any order within a bin."""
    BINS: tl.constexpr = 1 << LOG_BINS
    pid_split = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    lowest = tl.load(limits_ptr + image * 2)
    wanted = wanted_classes(classes_ptr, K, HAS_CLASSES, BLOCK_C, BLOCK_K)
    for start in range(pid_split * BLOCK_R, N, SPLITS * BLOCK_R):
        rows = start + tl.arange(0, BLOCK_R)
        row_ptrs, objectness, passing = open_rows(
            prediction_ptr, counts_ptr, image, rows, N, segment, conf, NC, HAS_COUNTS
        )
        if tl.max(passing.to(tl.int32), axis=0) > 0:
            keys = candidate_keys(
                row_ptrs, objectness, passing, wanted, rows, conf, NC, MULTI_LABEL, BLOCK_C
            )
            bins = BINS - 1 - tl.minimum((keys - key_of_bits(conf_bits)) >> shift, BINS - 1)
            mask = (keys >= 0) & (keys >= lowest)
            slots = tl.atomic_add(cursor_ptr + image * BINS + bins, 1, mask=mask, sem="relaxed")
            tl.store(keys_ptr + image * capacity + slots, keys, mask=mask)
