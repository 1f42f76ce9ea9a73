"""The greedy walk over an image's candidates, best first, one program per image.

Candidates come in groups of at most BLOCK keys, each better than all keys of later groups: as many
whole bins of the scatter as fit, or, of a bin that is larger than a group, the best keys left,
found by halving the interval of keys. Within a group nothing is sorted: "better" is a comparison
of keys. A group is compared with the boxes kept so far and with itself; the walk ends with the
box that completes `max_det`.
"""

from yolov7.kernels.nms.select import corners
from yolov7.kernels.runtime import tl, triton


@triton.jit
def _exceeds(
    # Boxes a: [BLOCK_A] fp32 each
    a_x1, a_y1, a_x2, a_y2,
    # Boxes b: [BLOCK_B] fp32 each
    b_x1, b_y1, b_x2, b_y2,
    # Scalars
    iou,
):  # fmt: skip
    """Whether the IoU of a and b exceeds `iou`, [BLOCK_A, BLOCK_B]; rounded as PyTorch rounds."""
    width = tl.minimum(a_x2[:, None], b_x2[None, :]) - tl.maximum(a_x1[:, None], b_x1[None, :])
    height = tl.minimum(a_y2[:, None], b_y2[None, :]) - tl.maximum(a_y1[:, None], b_y1[None, :])
    shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area_a = (a_x2 - a_x1) * (a_y2 - a_y1)
    area_b = (b_x2 - b_x1) * (b_y2 - b_y1)
    union = area_a[:, None] + area_b[None, :] - shared
    return tl.div_rn(shared, tl.where(union == 0.0, 1.0, union)) > iou  # 0 / 0 exceeds nothing


@triton.jit
def _count_keys(keys_ptr, start, end, low, high, SCAN: tl.constexpr):
    """How many keys of the slots [start, end) lie in [low, high)."""
    count = tl.full([], 0, tl.int32)
    for first in range(start, end, SCAN):
        slots = first + tl.arange(0, SCAN)
        keys = tl.load(keys_ptr + slots, mask=slots < end, other=-1)
        count += tl.sum(((keys >= low) & (keys < high)).to(tl.int32), axis=0)
    return count


@triton.jit
def _lower_bound(keys_ptr, start, end, high, BLOCK: tl.constexpr, SCAN: tl.constexpr):
    """A key such that between BLOCK / 2 and BLOCK keys of the slots lie in [it, high).

    More than BLOCK keys of the slots must lie below `high`. Keys differ, so halving the interval
    always ends.
    """
    low = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
    top = tl.full([], 0, tl.int64)
    for first in range(start, end, SCAN):
        slots = first + tl.arange(0, SCAN)
        keys = tl.load(keys_ptr + slots, mask=slots < end, other=-1)
        inside = (keys >= 0) & (keys < high)
        low = tl.minimum(low, tl.min(tl.where(inside, keys, low), axis=0))
        top = tl.maximum(top, tl.max(tl.where(inside, keys, top), axis=0))
    top += 1
    count = tl.full([], 0, tl.int32)
    while count < BLOCK // 2:
        middle = low + ((top - low) >> 1)
        above = _count_keys(keys_ptr, start, end, middle, high, SCAN)
        if above > BLOCK:
            low = middle
        else:
            top = middle
            count = above
    return top


@triton.jit
def _gather_keys(
    keys_ptr, group_ptr, start, end, low, high, BLOCK: tl.constexpr, SCAN: tl.constexpr
):
    """The keys of the slots [start, end) that lie in [low, high), at most BLOCK; -1 to fill up."""
    offs = tl.arange(0, BLOCK)
    tl.debug_barrier()
    tl.store(group_ptr + offs, tl.full([BLOCK], -1, tl.int64))
    tl.debug_barrier()
    count = tl.full([], 0, tl.int32)
    for first in range(start, end, SCAN):
        slots = first + tl.arange(0, SCAN)
        keys = tl.load(keys_ptr + slots, mask=slots < end, other=-1)
        inside = (keys >= low) & (keys < high)
        place = count + tl.cumsum(inside.to(tl.int32), axis=0) - 1
        tl.store(group_ptr + place, keys, mask=inside)
        count += tl.sum(inside.to(tl.int32), axis=0)
    tl.debug_barrier()
    return tl.load(group_ptr + offs)


@triton.jit
def _survivors(overlaps, alive):
    """Who of `alive` [BLOCK] is kept, if j suppresses i where overlaps[i, j] and j is kept.

    Starting from everyone, whoever overlaps a better one that is still in is out; the second round
    is right for all who have one better one above them, the n-th for chains of n, and a round that
    changes nothing is the answer of the scan one by one.
    """
    keep = alive
    changed = tl.full([], 1, tl.int32)
    while changed > 0:
        suppressed = tl.max((overlaps & keep[None, :]).to(tl.int32), axis=1) > 0
        updated = alive & (suppressed == 0)
        changed = tl.max((updated != keep).to(tl.int32), axis=0)
        keep = updated
    return keep


@triton.jit
def nms_greedy_kernel(
    # Tensors
    prediction_ptr,  # [B, N, 5 + NC]
    cursor_ptr,  # [B, 2^LOG_BINS] int32, the end of every bin
    limits_ptr,  # [B, 2] int64
    keys_ptr,  # [B, capacity] int64
    group_ptr,  # [B, BLOCK] int64, scratch
    kept_ptr,  # [B, max_det, 4] fp32, scratch: the kept boxes with their offsets
    boxes_ptr,  # [B, max_det, 6] fp32
    found_ptr,  # [B] int32
    # Shapes
    N,
    # Scalars
    iou,
    max_candidates,
    class_offset,
    max_det,
    capacity,
    # Constexprs
    NC: tl.constexpr,
    LOG_BINS: tl.constexpr,
    BLOCK: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Walk one image's candidates, a group of BLOCK at a time, until max_det are kept."""
    BINS: tl.constexpr = 1 << LOG_BINS
    image = tl.program_id(0).to(tl.int64)
    keys_ptr += image * capacity
    group_ptr += image * BLOCK
    kept_ptr += image * max_det * 4
    boxes_ptr += image * max_det * 6
    offs = tl.arange(0, BLOCK)
    taken = tl.load(limits_ptr + image * 2 + 1).to(tl.int32)
    ends = tl.minimum(tl.load(cursor_ptr + image * BINS + tl.arange(0, BINS)), taken)

    start = tl.full([], 0, tl.int32)  # slots [start, end) are under way,
    end = tl.full([], 0, tl.int32)
    high = tl.full([], 0, tl.int64)  # of which the keys below `high` are left,
    left = tl.full([], 0, tl.int32)  # so many
    walked = tl.full([], 0, tl.int32)
    kept = tl.full([], 0, tl.int32)
    while (kept < max_det) & (walked < tl.minimum(taken, max_candidates)):
        if left == 0:
            # As many whole bins as fit, or one that is larger than a group.
            start = end
            whole = tl.max(tl.where(ends <= start + BLOCK, ends, 0), axis=0)
            single = tl.min(tl.where(ends > start, ends, taken), axis=0)
            end = tl.maximum(whole, single)
            left = end - start
            high = tl.full([], 0x7FFFFFFFFFFFFFFF, tl.int64)
        low = tl.full([], 0, tl.int64)
        if left > BLOCK:
            low = _lower_bound(keys_ptr, start, end, high, BLOCK, SCAN)
        keys = _gather_keys(keys_ptr, group_ptr, start, end, low, high, BLOCK, SCAN)
        high = low
        valid = keys >= 0
        size = tl.sum(valid.to(tl.int32), axis=0)
        left -= size

        index = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
        label = index % NC
        row_ptrs = prediction_ptr + (image * N + index // NC) * (5 + NC)
        x1, y1, x2, y2 = corners(row_ptrs, valid)
        shift = label.to(tl.float32) * class_offset
        o_x1, o_y1, o_x2, o_y2 = x1 + shift, y1 + shift, x2 + shift, y2 + shift

        better = (keys[None, :] > keys[:, None]) & valid[None, :]
        rank = tl.sum(better.to(tl.int32), axis=1)
        alive = valid & (walked + rank < max_candidates)
        for first in range(0, kept, BLOCK):
            mask = first + offs < kept
            kept_ptrs = kept_ptr + (first + offs) * 4
            k_x1 = tl.load(kept_ptrs + 0, mask=mask, other=0.0)
            k_y1 = tl.load(kept_ptrs + 1, mask=mask, other=0.0)
            k_x2 = tl.load(kept_ptrs + 2, mask=mask, other=0.0)
            k_y2 = tl.load(kept_ptrs + 3, mask=mask, other=0.0)
            overlaps = _exceeds(o_x1, o_y1, o_x2, o_y2, k_x1, k_y1, k_x2, k_y2, iou)
            alive &= tl.max((overlaps & mask[None, :]).to(tl.int32), axis=1) == 0
        overlaps = _exceeds(o_x1, o_y1, o_x2, o_y2, o_x1, o_y1, o_x2, o_y2, iou)
        keep = _survivors(overlaps & better, alive)

        place = kept + tl.sum((better & keep[None, :]).to(tl.int32), axis=1)
        mask = keep & (place < max_det)
        kept_ptrs = kept_ptr + place * 4
        tl.store(kept_ptrs + 0, o_x1, mask=mask)
        tl.store(kept_ptrs + 1, o_y1, mask=mask)
        tl.store(kept_ptrs + 2, o_x2, mask=mask)
        tl.store(kept_ptrs + 3, o_y2, mask=mask)
        box_ptrs = boxes_ptr + place * 6
        tl.store(box_ptrs + 0, x1, mask=mask)
        tl.store(box_ptrs + 1, y1, mask=mask)
        tl.store(box_ptrs + 2, x2, mask=mask)
        tl.store(box_ptrs + 3, y2, mask=mask)
        tl.store(box_ptrs + 4, (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=mask)
        tl.store(box_ptrs + 5, label.to(tl.float32), mask=mask)
        kept += tl.sum(keep.to(tl.int32), axis=0)
        walked += size
        tl.debug_barrier()

    kept = tl.minimum(kept, max_det)
    tl.store(found_ptr + image, kept)
    for first in range(kept * 6, max_det * 6, BLOCK):
        tl.store(boxes_ptr + first + offs, 0.0, mask=first + offs < max_det * 6)
