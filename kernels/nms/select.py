"""Choosing an image's best candidates on the device: histogram, selection, scatter.

A candidate is one int64 key: the bits of its score (positive floats order as integers), then
2^31 - 1 - (row * nc + class), so that the larger key is the better candidate and no two are equal.

The rows lie in segments, of which only the first ones are valid: `decode` leaves a count for each.
Without counts a row is a segment of its own and valid if its objectness exceeds `conf`. A program
takes every SPLITS-th segment, many at a time, and finds their valid rows by a prefix sum of their
counts, so that what it waits for is the rows that there are, not those that there could be.

`nms_histogram_kernel` counts the keys above `conf` in bins of equal width over the bits of
conf..1, each program in its own histogram, which it clears itself. `nms_select_kernel` sums them,
finds the bin in which the `max_candidates`-th key lies, and with it the lowest key to take, and
where each bin starts. If that bin is too full for the buffer (a great many equal scores), it is cut
into bins again, down to single keys: what is taken never depends on the order of arrival.
`nms_scatter_kernel` writes the keys taken, bin after bin; within a bin their order is arbitrary
and nothing that follows depends on it.
"""

from typing import Any, NamedTuple

from yolov7.kernels.runtime import begin, tl, triton


class Scan(NamedTuple):
    """What all who look for candidates read; `Sizes` goes with it."""

    prediction_ptr: Any  # [B, N, 5 + NC]
    counts_ptr: Any  # [B, segments] int32, or None: every row is a segment
    classes_ptr: Any  # [K], or None: all classes are asked for
    segments: int
    length: int  # rows of a segment
    K: int
    conf: float
    conf_bits: int  # of its fp32
    shift: int  # log2 of the keys per bin


class Sizes(NamedTuple):
    """Constants of a scan."""

    NC: int
    MULTI_LABEL: bool
    LOG_BINS: int
    SPLITS: int  # programs, and histograms, of an image
    BLOCK_S: int  # segments that a program takes at once
    BLOCK_R: int  # rows of them
    BLOCK_C: int
    BLOCK_K: int


class Corners(NamedTuple):
    """Boxes, [R] fp32 each."""

    x1: Any
    y1: Any
    x2: Any
    y2: Any


@triton.jit
def corners(row_ptrs, mask):
    """The boxes of rows."""
    x = tl.load(row_ptrs + 0, mask=mask, other=0.0).to(tl.float32)
    y = tl.load(row_ptrs + 1, mask=mask, other=0.0).to(tl.float32)
    half_w = tl.load(row_ptrs + 2, mask=mask, other=0.0).to(tl.float32) * 0.5
    half_h = tl.load(row_ptrs + 3, mask=mask, other=0.0).to(tl.float32) * 0.5
    return Corners(x - half_w, y - half_h, x + half_w, y + half_h)


@triton.jit
def _valid_rows(scan, image, first, STEP: tl.constexpr, SIZES: tl.constexpr):
    """How many rows are valid up to and with each of BLOCK_S segments, every STEP-th of them."""
    segments = first + STEP * tl.arange(0, SIZES.BLOCK_S)
    held = segments < scan.segments
    if scan.counts_ptr is not None:
        counts = tl.load(scan.counts_ptr + image * scan.segments + segments, mask=held, other=0)
        counts = tl.minimum(tl.maximum(counts, 0), scan.length)
    else:
        row_ptrs = scan.prediction_ptr + (image * scan.segments + segments) * (5 + SIZES.NC)
        objectness = tl.load(row_ptrs + 4, mask=held, other=0.0).to(tl.float32)
        counts = (held & (objectness > scan.conf)).to(tl.int32)
    return tl.cumsum(counts, axis=0)


@triton.jit
def _block_of_keys(
    scan,
    image,
    wanted,  # [BLOCK_C] bool
    ends,  # [BLOCK_S], of `_valid_rows`
    found,  # the last of them
    first,
    start,
    STEP: tl.constexpr,
    SIZES: tl.constexpr,
):
    """Keys [BLOCK_R, BLOCK_C] of the valid rows from number `start` on, -1 where there is none."""
    place = start + tl.arange(0, SIZES.BLOCK_R)
    passed = ends[None, :] <= place[:, None]
    segment = tl.sum(passed.to(tl.int32), axis=1)
    before = tl.max(tl.where(passed, ends[None, :], 0), axis=1)
    rows = (first + segment * STEP) * scan.length + place - before
    row_ptrs = scan.prediction_ptr + (image * scan.segments * scan.length + rows) * (5 + SIZES.NC)
    mask = place < found
    objectness = tl.load(row_ptrs + 4, mask=mask, other=0.0).to(tl.float32)
    passing = mask & (objectness > scan.conf)
    return _candidate_keys(row_ptrs, objectness, passing, wanted, rows, scan.conf, SIZES)


@triton.jit
def _candidate_keys(
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
    SIZES: tl.constexpr,
):
    """Keys [R, BLOCK_C] int64 of the candidates of these rows, -1 where there is none."""
    NC: tl.constexpr = SIZES.NC
    offs_c = tl.arange(0, SIZES.BLOCK_C)
    box = corners(row_ptrs, passing)
    finite = (tl.abs(box.x1) < float("inf")) & (tl.abs(box.y1) < float("inf"))
    finite &= (tl.abs(box.x2) < float("inf")) & (tl.abs(box.y2) < float("inf"))
    mask = (passing & finite)[:, None] & (offs_c < NC)[None, :]
    if NC == 1:
        scores = tl.broadcast_to(objectness[:, None], mask.shape)
    else:
        probability = tl.load(row_ptrs[:, None] + 5 + offs_c[None, :], mask=mask, other=0.0)
        scores = probability.to(tl.float32) * objectness[:, None]
    scores = tl.where(mask & (scores > conf), scores, -1.0)  # NaN > conf is false
    if not SIZES.MULTI_LABEL:
        best = tl.argmax(scores, axis=1)  # the first of equals
        scores = tl.where(offs_c[None, :] == best[:, None], scores, -1.0)
    index = rows[:, None] * NC + offs_c[None, :]
    bits = scores.to(tl.int32, bitcast=True).to(tl.int64)
    keys = (bits << 32) | (0x7FFFFFFF - index).to(tl.int64)
    return tl.where((scores > conf) & wanted[None, :], keys, -1)


@triton.jit
def _wanted_classes(scan, SIZES: tl.constexpr):
    """Which classes are asked for: [BLOCK_C] bool."""
    offs_c = tl.arange(0, SIZES.BLOCK_C)
    wanted = offs_c >= 0
    if scan.classes_ptr is not None:
        offs_k = tl.arange(0, SIZES.BLOCK_K)
        classes = tl.load(scan.classes_ptr + offs_k, mask=offs_k < scan.K, other=-1).to(tl.int32)
        wanted = tl.max((offs_c[:, None] == classes[None, :]).to(tl.int32), axis=1) > 0
    return wanted


@triton.jit
def _key_of_bits(bits):
    """The lowest key of a score with these bits."""
    return (tl.full([], 0, tl.int64) + bits) << 32


@triton.jit
def _first_bins(keys, scan, BINS: tl.constexpr):
    """The bins of keys over the bits of conf..1, the best first; the best one has no upper end."""
    return BINS - 1 - tl.minimum((keys - _key_of_bits(scan.conf_bits)) >> scan.shift, BINS - 1)


@triton.jit
def nms_histogram_kernel(
    # Tensors
    scan,  # Scan
    histogram_ptr,  # [B, SPLITS, 2^LOG_BINS] int32
    # Constexprs
    SIZES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Count the candidates of every SPLITS-th segment by key, best bin first."""
    BINS: tl.constexpr = 1 << SIZES.LOG_BINS
    begin(PDL)
    pid_split = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    bins_ptr = histogram_ptr + (image * SIZES.SPLITS + pid_split) * BINS
    tl.store(bins_ptr + tl.arange(0, BINS), 0)
    tl.debug_barrier()  # the histogram is clear
    wanted = _wanted_classes(scan, SIZES)
    for first in range(pid_split, scan.segments, SIZES.SPLITS * SIZES.BLOCK_S):
        ends = _valid_rows(scan, image, first, SIZES.SPLITS, SIZES)
        found = tl.max(ends, axis=0)
        for start in range(0, found, SIZES.BLOCK_R):
            keys = _block_of_keys(
                scan, image, wanted, ends, found, first, start, SIZES.SPLITS, SIZES
            )
            bins = _first_bins(keys, scan, BINS)
            tl.atomic_add(bins_ptr + bins, 1, mask=keys >= 0, sem="relaxed")


@triton.jit
def _count_window(
    # Tensors
    scan,
    bins_ptr,  # [2^LOG_BINS] int32, of this image
    wanted,  # [BLOCK_C] bool
    # Scalars
    image,
    low,
    high,
    shift,
    # Constexprs
    SIZES: tl.constexpr,
):
    """The histogram [2^LOG_BINS] of the keys in [low, high), 2^shift of them a bin."""
    BINS: tl.constexpr = 1 << SIZES.LOG_BINS
    bins_ptrs = bins_ptr + tl.arange(0, BINS)
    tl.debug_barrier()
    tl.store(bins_ptrs, 0)
    tl.debug_barrier()  # everyone has read the old one, and the new one is clear
    for first in range(0, scan.segments, SIZES.BLOCK_S):
        ends = _valid_rows(scan, image, first, 1, SIZES)
        found = tl.max(ends, axis=0)
        for start in range(0, found, SIZES.BLOCK_R):
            keys = _block_of_keys(scan, image, wanted, ends, found, first, start, 1, SIZES)
            bins = BINS - 1 - ((keys - low) >> shift)
            mask = (keys >= low) & (keys < high)
            tl.atomic_add(bins_ptr + bins, 1, mask=mask, sem="relaxed")
    tl.debug_barrier()
    return tl.load(bins_ptrs)


@triton.jit
def nms_select_kernel(
    # Tensors
    scan,  # Scan
    histogram_ptr,  # [B, SPLITS, 2^LOG_BINS] int32
    cursor_ptr,  # [B, 2^LOG_BINS] int32
    limits_ptr,  # [B, 2] int64: the lowest key taken, the number taken
    overflow_ptr,  # [B] int32
    # Scalars
    max_candidates,
    capacity,
    # Constexprs
    SIZES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Choose the lowest key whose candidates and all better ones fit the buffer, per image."""
    LOG_BINS: tl.constexpr = SIZES.LOG_BINS
    BINS: tl.constexpr = 1 << LOG_BINS
    begin(PDL)
    image = tl.program_id(0).to(tl.int64)
    offs_bin = tl.arange(0, BINS)
    bins_ptr = histogram_ptr + image * SIZES.SPLITS * BINS

    # The cursor of each bin is where its first candidate will lie.
    histogram = tl.zeros([BINS], dtype=tl.int32)
    SPLITS: tl.constexpr = SIZES.SPLITS
    for split in tl.static_range(SPLITS):  # their loads do not wait for one another
        histogram += tl.load(bins_ptr + split * BINS + offs_bin)
    total = tl.sum(histogram, axis=0)
    tl.store(overflow_ptr + image, tl.maximum(total - max_candidates, 0))
    tl.store(cursor_ptr + image * BINS + offs_bin, tl.cumsum(histogram, axis=0) - histogram)

    # The window [low, high) of keys is cut into bins; `above` candidates are better than all of it.
    low = _key_of_bits(scan.conf_bits)
    high = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    shift = tl.full([], 0, tl.int32) + scan.shift
    clamped = tl.full([], 1, tl.int32)  # the best bin of the first window has no upper end
    above = tl.full([], 0, tl.int32)
    taken = tl.full([], 0, tl.int32)
    searching = tl.full([], 1, tl.int32)
    wanted = _wanted_classes(scan, SIZES)
    while searching > 0:
        # `last` is the bin of the `max_candidates`-th best; with all of it, `taken` are taken.
        inclusive = above + tl.cumsum(histogram, axis=0)
        needed = inclusive - histogram < max_candidates
        last = tl.sum(needed.to(tl.int32), axis=0) - 1
        taken = tl.max(tl.where(needed, inclusive, 0), axis=0)
        low += (BINS - 1 - last).to(tl.int64) << shift
        if taken <= capacity:
            searching = tl.full([], 0, tl.int32)
        else:
            # That bin alone is too full: it becomes the window.
            above = tl.max(tl.where(needed, inclusive - histogram, 0), axis=0)
            if (clamped > 0) & (last == 0):
                shift = tl.full([], 63 - LOG_BINS, tl.int32)
            else:
                high = low + tl.minimum(tl.full([], 1, tl.int64) << shift, high - low)
                shift = tl.maximum(shift - LOG_BINS, 0)
            clamped = tl.full([], 0, tl.int32)
            histogram = _count_window(scan, bins_ptr, wanted, image, low, high, shift, SIZES)
    tl.store(limits_ptr + image * 2, low)
    tl.store(limits_ptr + image * 2 + 1, taken.to(tl.int64))


@triton.jit
def nms_scatter_kernel(
    # Tensors
    scan,  # Scan
    cursor_ptr,  # [B, 2^LOG_BINS] int32
    limits_ptr,  # [B, 2] int64
    keys_ptr,  # [B, capacity] int64
    # Scalars
    capacity,
    # Constexprs
    SIZES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Write the keys that were chosen, bin after bin, in any order within a bin."""
    BINS: tl.constexpr = 1 << SIZES.LOG_BINS
    begin(PDL)
    pid_split = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    lowest = tl.load(limits_ptr + image * 2)
    wanted = _wanted_classes(scan, SIZES)
    for first in range(pid_split, scan.segments, SIZES.SPLITS * SIZES.BLOCK_S):
        ends = _valid_rows(scan, image, first, SIZES.SPLITS, SIZES)
        found = tl.max(ends, axis=0)
        for start in range(0, found, SIZES.BLOCK_R):
            keys = _block_of_keys(
                scan, image, wanted, ends, found, first, start, SIZES.SPLITS, SIZES
            )
            bins = _first_bins(keys, scan, BINS)
            mask = (keys >= 0) & (keys >= lowest)
            slots = tl.atomic_add(cursor_ptr + image * BINS + bins, 1, mask=mask, sem="relaxed")
            tl.store(keys_ptr + image * capacity + slots, keys, mask=mask)
