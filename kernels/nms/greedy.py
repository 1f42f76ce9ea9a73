"""The greedy walk over an image's candidates, best first, one program per image.

Candidates come in groups of at most BLOCK keys, each better than all keys of later groups: as many
whole bins of the scatter as fit, or, of a bin that is larger than a group, the best keys left,
found by halving the interval of keys. Within a group nothing is sorted: "better" is a comparison
of keys. A group is compared with the boxes kept so far and with itself; the walk ends with the
box that completes `max_det`.
"""

from yolov7.kernels.nms.select import Corners, corners
from yolov7.kernels.runtime import begin, tl, triton


@triton.jit
def _exceeds(a, b, iou):
    """Whether the IoU of boxes a and b exceeds `iou`, [len(a), len(b)]; rounded as PyTorch does."""
    width = tl.minimum(a.x2[:, None], b.x2[None, :]) - tl.maximum(a.x1[:, None], b.x1[None, :])
    height = tl.minimum(a.y2[:, None], b.y2[None, :]) - tl.maximum(a.y1[:, None], b.y1[None, :])
    shared = tl.maximum(width, 0.0) * tl.maximum(height, 0.0)
    area_a = (a.x2 - a.x1) * (a.y2 - a.y1)
    area_b = (b.x2 - b.x1) * (b.y2 - b.y1)
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
def _next_end(ends, start, taken, BLOCK: tl.constexpr):
    """Where the slots from `start` on end that are walked next.

    They are as many whole bins as fit into a group, or one bin that is larger than a group.
    """
    whole = tl.max(tl.where(ends <= start + BLOCK, ends, 0), axis=0)
    single = tl.min(tl.where(ends > start, ends, taken), axis=0)
    return tl.maximum(whole, single)


@triton.jit
def _boxes_of_keys(prediction_ptr, image, keys, valid, N, NC: tl.constexpr):
    """The boxes of candidates and their classes, [BLOCK]."""
    index = 0x7FFFFFFF - (keys & 0x7FFFFFFF).to(tl.int32)
    row_ptrs = prediction_ptr + (image * N + index // NC) * (5 + NC)
    return corners(row_ptrs, valid), index % NC


@triton.jit
def _clear_of_kept(box, kept_ptr, kept, iou, BLOCK: tl.constexpr):
    """Which boxes [BLOCK] have no IoU above `iou` with one of those that were kept before."""
    offs = tl.arange(0, BLOCK)
    clear = offs >= 0
    for first in range(0, kept, BLOCK):
        mask = first + offs < kept
        kept_ptrs = kept_ptr + (first + offs) * 4
        other = Corners(
            tl.load(kept_ptrs + 0, mask=mask, other=0.0),
            tl.load(kept_ptrs + 1, mask=mask, other=0.0),
            tl.load(kept_ptrs + 2, mask=mask, other=0.0),
            tl.load(kept_ptrs + 3, mask=mask, other=0.0),
        )
        overlaps = _exceeds(box, other, iou) & mask[None, :]
        clear &= tl.max(overlaps.to(tl.int32), axis=1) == 0
    return clear


@triton.jit
def _in_frame(box, frame_ptr):
    """Boxes of a letterbox in pixels of its frame, rounded as PyTorch does."""
    pad_x, pad_y = tl.load(frame_ptr), tl.load(frame_ptr + 1)
    ratio_x, ratio_y = tl.load(frame_ptr + 4), tl.load(frame_ptr + 5)
    width, height = tl.load(frame_ptr + 8), tl.load(frame_ptr + 9)
    return Corners(
        _in_range(box.x1, pad_x, ratio_x, width),
        _in_range(box.y1, pad_y, ratio_y, height),
        _in_range(box.x2, pad_x, ratio_x, width),
        _in_range(box.y2, pad_y, ratio_y, height),
    )


@triton.jit
def _in_range(place, pad, ratio, limit):
    ratio = tl.broadcast_to(ratio, place.shape)
    return tl.minimum(tl.maximum(tl.div_rn(place - pad, ratio), 0.0), limit)


@triton.jit
def _store_corners(ptrs, box, mask):
    tl.store(ptrs + 0, box.x1, mask=mask)
    tl.store(ptrs + 1, box.y1, mask=mask)
    tl.store(ptrs + 2, box.x2, mask=mask)
    tl.store(ptrs + 3, box.y2, mask=mask)


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
    frames_ptr,  # [B, 3, 4] fp32 or None
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
    PDL: tl.constexpr,
):
    """Walk one image's candidates, a group of BLOCK at a time, until max_det are kept."""
    BINS: tl.constexpr = 1 << LOG_BINS
    begin(PDL)
    image = tl.program_id(0).to(tl.int64)
    keys_ptr += image * capacity
    group_ptr += image * BLOCK
    kept_ptr += image * max_det * 4
    boxes_ptr += image * max_det * 6
    taken = tl.load(limits_ptr + image * 2 + 1).to(tl.int32)
    ends = tl.minimum(tl.load(cursor_ptr + image * BINS + tl.arange(0, BINS)), taken)

    start = tl.full([], 0, tl.int32)  # slots [start, end) are under way,
    end = tl.full([], 0, tl.int32)
    high = tl.full([], 0, tl.int64)  # of which the keys below `high` are left,
    left = tl.full([], 0, tl.int32)  # so many
    walked = tl.full([], 0, tl.int32)
    kept = tl.full([], 0, tl.int32)
    while (kept < max_det) & (walked < tl.minimum(taken, max_candidates)):
        # `keys` are the best that are left, at most BLOCK of them, in any order.
        if left == 0:
            start = end
            end = _next_end(ends, start, taken, BLOCK)
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

        # `apart` are their boxes, those of other classes out of reach.
        box, label = _boxes_of_keys(prediction_ptr, image, keys, valid, N, NC)
        shift = label.to(tl.float32) * class_offset
        apart = Corners(box.x1 + shift, box.y1 + shift, box.x2 + shift, box.y2 + shift)

        # `alive` are among the first max_candidates and clear of all that is kept; those of them
        # that are clear of each other, the better one first, are kept.
        better = (keys[None, :] > keys[:, None]) & valid[None, :]
        rank = tl.sum(better.to(tl.int32), axis=1)
        alive = valid & (walked + rank < max_candidates)
        alive &= _clear_of_kept(apart, kept_ptr, kept, iou, BLOCK)
        keep = _survivors(_exceeds(apart, apart, iou) & better, alive)

        # They follow the kept ones, best first.
        place = kept + tl.sum((better & keep[None, :]).to(tl.int32), axis=1)
        mask = keep & (place < max_det)
        _store_corners(kept_ptr + place * 4, apart, mask)
        box_ptrs = boxes_ptr + place * 6
        if frames_ptr is not None:
            box = _in_frame(box, frames_ptr + image * 12)
        _store_corners(box_ptrs, box, mask)
        tl.store(box_ptrs + 4, (keys >> 32).to(tl.int32).to(tl.float32, bitcast=True), mask=mask)
        tl.store(box_ptrs + 5, label.to(tl.float32), mask=mask)
        kept += tl.sum(keep.to(tl.int32), axis=0)
        walked += size
        tl.debug_barrier()  # what was kept can be read

    kept = tl.minimum(kept, max_det)
    tl.store(found_ptr + image, kept)
    offs = tl.arange(0, BLOCK)
    for first in range(kept * 6, max_det * 6, BLOCK):
        tl.store(boxes_ptr + first + offs, 0.0, mask=first + offs < max_det * 6)
