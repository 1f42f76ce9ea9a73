"""Batched non-maximum suppression.

A row of the prediction `[B, N, 5 + nc]` (centre x, centre y, width, height in pixels, objectness,
class probabilities) gives at most one candidate, its best class, or with `multi_label` one per
class. A candidate needs objectness > conf and score = objectness x class > conf, and its four
corners must be finite; NaN never passes. With one class the score is the objectness alone.

The best `max_candidates` of an image, by score and then by row x nc + class, are walked in that
order: one is kept unless its IoU with a kept one exceeds `iou`. Boxes of different classes are kept
apart by an offset of 4096 px per class, added in fp32, in which everything here is computed.

On the device: four launches, no fill, no host synchronisation and shapes that depend on the
arguments only, so a CUDA graph can hold it; `select` and `greedy` describe them. The result does
not depend on the order in which programs run, and equals the reference's bit for bit: division is
rounded to nearest and nothing is fused.

Expected on an H200 at 4.3 TB/s, 25 200 rows x 80 classes, batch 32, fp32. Without counts the
objectness column is read twice, a 32-byte sector a row: 2 x 26 MB = 12 us; at conf 0.25 some 500
rows an image are read whole. Walking 500 candidates with 100 kept is 8 groups x 3 x 64 x 64 IoUs of
40 operations on one processor of 128 lanes, 8 x 2.3 us, 32 images side by side; with launches and
latencies about 60 us a batch. At conf 0.001, multi-label, half of all rows are read whole, twice:
2 x 137 MB = 65 us, and 5000 candidates walked until 300 are kept are 80 groups x 6 x 64 x 64 IoUs,
0.36 ms.
"""

import functools
import itertools
import struct
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from yolov7.kernels.nms.greedy import nms_greedy_kernel
from yolov7.kernels.nms.reference import CLASS_OFFSET, nms_reference
from yolov7.kernels.nms.select import (
    Scan,
    Sizes,
    nms_histogram_kernel,
    nms_scatter_kernel,
    nms_select_kernel,
)
from yolov7.kernels.runtime import (
    Config,
    early,
    launch,
    processors,
    triton,
    triton_op,
)

__all__ = ["Detections", "batched_nms", "compile_cases", "nms_reference"]

SLACK = 4096
"""Candidates beyond `max_candidates` for which the buffer has room: the rest of the last bin."""

CONFIG: Config = {
    "BLOCK": 64,
    "SCAN": 1024,
    "SEGMENTS": 256,
    "ELEMENTS": 2048,
    "LOG_BINS": 12,
    "num_warps": 8,
}


class Detections(NamedTuple):
    """What is left of a batch after suppression, highest score first.

    Attributes:
        boxes: [B, max_det, 6] fp32: x1, y1, x2, y2 in pixels, score, class; zero beyond the count.
        counts: [B] int32, boxes kept per image.
        overflow: [B] int32, candidates beyond `max_candidates`, which were not looked at.
    """

    boxes: Tensor
    counts: Tensor
    overflow: Tensor


def _scan(
    prediction: Tensor,
    segment_counts: Tensor | None,
    classes: Tensor | None,
    conf: float,
    config: Config,
) -> Scan:
    rows = prediction.shape[1]
    segments = rows if segment_counts is None else segment_counts.shape[1]
    conf_bits, one_bits = struct.unpack("<2i", struct.pack("<2f", conf + 0.0, 1.0))  # no -0.0
    bin_bits = max((one_bits - conf_bits).bit_length() - config["LOG_BINS"], 0)
    return Scan(
        prediction,
        segment_counts,
        classes,
        segments=segments,
        length=rows // max(segments, 1),
        K=0 if classes is None else classes.shape[0],
        conf=conf,
        conf_bits=conf_bits,
        shift=32 + bin_bits,
    )


def _sizes(
    nc: int, classes: Tensor | None, multi_label: bool, splits: int, segments: int, config: Config
) -> Sizes:
    block_c = triton.next_power_of_2(nc)
    share = triton.cdiv(max(segments, 1), splits)
    return Sizes(
        nc,
        multi_label,
        config["LOG_BINS"],
        splits,
        BLOCK_S=min(triton.next_power_of_2(share), config["SEGMENTS"]),
        BLOCK_R=min(max(config["ELEMENTS"] // block_c, 1), 256),
        BLOCK_C=block_c,
        BLOCK_K=1 if classes is None else triton.next_power_of_2(max(classes.shape[0], 1)),
    )


def _launch_nms(
    # Tensors
    prediction: Tensor,
    segment_counts: Tensor | None,
    classes: Tensor | None,
    frames: Tensor | None,
    result: tuple[Tensor, Tensor, Tensor],
    work: dict[str, Tensor],
    # Scalars
    conf: float,
    iou: float,
    multi_label: bool,
    agnostic: bool,
    max_candidates: int,
    config: Config,
) -> None:
    boxes, counts, overflow = result
    batch, rows, width = prediction.shape
    nc, capacity = width - 5, work["keys"].shape[1]
    splits = work["histogram"].shape[1]
    warps = {"num_warps": config["num_warps"], **early(prediction.device)}
    where = _scan(prediction, segment_counts, classes, conf, config)
    sizes = _sizes(nc, classes, multi_label, splits, where.segments, config)
    scan = {"scan": where, "SIZES": sizes}
    grid = (splits, batch)
    # Left alone, ptxas spills for an occupancy that so few programs cannot have.
    roomy = {**warps, "maxnreg": 168}
    launch(nms_histogram_kernel, grid, {**scan, "histogram_ptr": work["histogram"]}, roomy)
    choice = {"cursor_ptr": work["cursor"], "limits_ptr": work["limits"], "capacity": capacity}
    select = {
        **scan,
        **choice,
        "histogram_ptr": work["histogram"],
        "overflow_ptr": overflow,
        "max_candidates": max_candidates,
    }
    launch(nms_select_kernel, (batch,), select, roomy)
    launch(nms_scatter_kernel, grid, {**scan, **choice, "keys_ptr": work["keys"]}, roomy)
    greedy = {
        **choice,
        "prediction_ptr": prediction,
        "keys_ptr": work["keys"],
        "group_ptr": work["group"],
        "kept_ptr": work["kept"],
        "boxes_ptr": boxes,
        "frames_ptr": frames,
        "found_ptr": counts,
        "N": rows,
        "iou": iou,
        "max_candidates": max_candidates,
        "class_offset": 0.0 if agnostic else CLASS_OFFSET,
        "max_det": boxes.shape[1],
        "NC": nc,
        "LOG_BINS": config["LOG_BINS"],
        "BLOCK": config["BLOCK"],
        "SCAN": config["SCAN"],
    }
    launch(nms_greedy_kernel, (batch,), greedy, {**warps, "enable_fp_fusion": False})


def _empty_result(prediction: Tensor, max_det: int) -> tuple[Tensor, Tensor, Tensor]:
    batch = prediction.shape[0]
    return (
        prediction.new_empty((batch, max_det, 6), dtype=torch.float32),
        prediction.new_empty(batch, dtype=torch.int32),
        prediction.new_empty(batch, dtype=torch.int32),
    )


def _nms_triton(
    prediction: Tensor,
    segment_counts: Tensor | None,
    classes: Tensor | None,
    frames: Tensor | None,
    conf: float,
    iou: float,
    multi_label: bool,
    agnostic: bool,
    max_det: int,
    max_candidates: int,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, rows, width = prediction.shape
    possible = rows * (width - 5 if multi_label else 1)
    # Histograms are added by one program, so there are not many.
    splits = min(max(4 * processors(prediction.device) // max(batch, 1), 8), 16)
    bins = 1 << CONFIG["LOG_BINS"]
    shapes = {
        "histogram": (torch.int32, (min(splits, triton.cdiv(max(rows, 1), 64)), bins)),
        "cursor": (torch.int32, (bins,)),
        "limits": (torch.int64, (2,)),
        "keys": (torch.int64, (min(possible, max_candidates + SLACK),)),
        "group": (torch.int64, (CONFIG["BLOCK"],)),
        "kept": (torch.float32, (max_det, 4)),
    }
    work = {
        name: prediction.new_empty((batch, *shape), dtype=dtype)
        for name, (dtype, shape) in shapes.items()
    }
    result = _empty_result(prediction, max_det)
    prediction = prediction.contiguous()
    _launch_nms(
        prediction,
        segment_counts,
        classes,
        frames,
        result,
        work,
        conf,
        iou,
        multi_label,
        agnostic,
        max_candidates,
        CONFIG,
    )
    return result


def _nms_fake(prediction: Tensor, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, max_det, _ = arguments
    return _empty_result(prediction, max_det)


nms_op = triton_op("nms", _nms_triton, nms_reference, _nms_fake)


def batched_nms(
    prediction: Tensor,
    *,
    conf: float = 0.25,
    iou: float = 0.45,
    multi_label: bool = False,
    agnostic: bool = False,
    classes: Tensor | None = None,
    max_det: int = 300,
    max_candidates: int = 30000,
    segment_counts: Tensor | None = None,
    frames: Tensor | None = None,
) -> Detections:
    """Keep the best boxes of every image of a batch.

    Args:
        prediction: [B, N, 5 + nc] fp32, fp16 or bf16, decoded: centre x, centre y, width, height in
            pixels, objectness, class probabilities.
        conf: what objectness and score must exceed, in 0..1.
        iou: the IoU with a better box above which a box is dropped, in 0..1.
        multi_label: every class of a row may be a box, not only its best; without effect if nc = 1.
        agnostic: boxes of different classes suppress each other too.
        classes: class ids [k] (integers) to keep; all if None.
        max_det: boxes kept per image.
        max_candidates: candidates per image that are looked at, the best ones; more are counted.
        segment_counts: [B, S] int32; the rows are S segments of N / S rows, of which only so many,
            the first, are valid (`decode` writes such predictions); all are if None.
        frames: [B, 3, 4] fp32, of each image what its letterbox added left and above, its scale and
            the frame's width and height, each for x1, y1, x2, y2: boxes are given in pixels of the
            frame, clipped to it. None: as in the prediction.

    Returns:
        The boxes, highest score first, equal scores in the order of row and class.

    Raises:
        ValueError: wrong rank, dtype, device, width or limits.
    """
    shape = list(prediction.shape)
    if prediction.ndim != 3 or shape[2] < 6:
        raise ValueError(f"prediction must be [B, N, 5 + nc], got {shape}")
    if prediction.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"prediction must be fp32, fp16 or bf16, got {prediction.dtype}")
    if shape[1] * (shape[2] - 5) >= 2**31:
        raise ValueError(f"prediction {shape} has 2^31 candidates or more an image")
    if not (0 <= conf <= 1 and 0 <= iou <= 1):
        raise ValueError(f"conf and iou must lie in 0..1, got {conf} and {iou}")
    if max_det < 1 or max_candidates < 1:
        raise ValueError(f"limits must be at least 1, got {max_det=} and {max_candidates=}")
    if classes is not None and (classes.ndim != 1 or classes.dtype not in _INTEGERS):
        raise ValueError(f"classes must be integers [k], got {classes.dtype} {list(classes.shape)}")
    if segment_counts is not None:
        counts = list(segment_counts.shape)
        fits = len(counts) == 2 and counts[0] == shape[0] and counts[1] and not shape[1] % counts[1]
        if not fits or segment_counts.dtype != torch.int32:
            raise ValueError(
                f"segment_counts must be int32 [B, S] with N a multiple of S, got "
                f"{segment_counts.dtype} {counts} for a prediction {shape}"
            )
    if frames is not None and (frames.shape, frames.dtype) != ((shape[0], 3, 4), torch.float32):
        raise ValueError(
            f"frames must be fp32 [{shape[0]}, 3, 4], got {frames.dtype} {list(frames.shape)}"
        )
    others = {"classes": classes, "segment_counts": segment_counts, "frames": frames}
    for name, other in others.items():
        if other is not None and other.device != prediction.device:
            raise ValueError(f"{name} on {other.device}, prediction on {prediction.device}")
    multi_label = multi_label and shape[2] > 6
    classes = None if classes is None else classes.contiguous()
    segment_counts = None if segment_counts is None else segment_counts.contiguous()
    frames = None if frames is None else frames.contiguous()
    arguments = (conf, iou, multi_label, agnostic, max_det, max_candidates)
    return Detections(*nms_op(prediction, segment_counts, classes, frames, *arguments))


_INTEGERS = (torch.int32, torch.int64)


def compile_cases(
    rows: int = 25200, nc: int = 80, batch: int = 32
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches to compile ahead of time, see `yolov7.kernels.runtime.CompileSpec`."""
    segments = triton.cdiv(rows, 64)
    prediction = torch.empty(batch, segments * 64, 5 + nc, device="meta")
    counts = torch.empty((batch, segments), dtype=torch.int32, device="meta")
    frames = torch.empty(batch, 3, 4, device="meta")
    forms = {"": (None, None), " of candidates": (counts, frames)}
    for (form, (given, table)), multi_label in itertools.product(forms.items(), (False, True)):
        limits = (0.25, 0.45, multi_label, False, 300, 30000)
        name = f"{batch}x{segments * 64}x{nc}{form}{' multi-label' if multi_label else ''}"
        yield name, functools.partial(_nms_triton, prediction, given, None, table, *limits)
