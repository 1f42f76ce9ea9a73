"""The detection head: 1x1 convolution, sigmoid, grid, anchors, threshold and compaction in one.

For every level, pixel and anchor, with s = sigmoid(W x + b) of 5 + nc channels,

    x, y = (2 s - 0.5 + (column, row)) stride,   w, h = (2 s)^2 anchor,   objectness, classes = s.

The dense form writes [B, N, 5 + nc] fp32, levels in order, within a level anchor, row, column. The
candidate form writes only the rows whose objectness exceeds `conf`: the rows of one level and
anchor are cut into segments of 64 pixels, and each segment's survivors lie at its start, in order,
with their number in `counts` [B, S]. A program owns a segment, so there are no atomics, the result
does not depend on the order of programs, and the order of rows, by which `nms` breaks ties, is the
dense one. `batched_nms(rows, segment_counts=counts)` reads the survivors only.

Each program multiplies 64 pixels by one anchor's channels, so the epilogue sees whole rows. 85
channels are computed as 128; features are read once per anchor, twice of three from the L2 cache.

Expected on an H200 (4.3 TB/s, 790 TFLOP/s), YOLOv7 at 640, 80 classes, fp16, per image: 5.7 MB of
features are 1.3 us; 1.37 GFLOP, 2.06 with the padding, 2.6 us at full rate and 4 us at 65 %. The
dense form writes 8.6 MB more, 2 us; the candidate form some 500 rows of 340 bytes.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov7.kernels.decode.kernels import Level, decode_kernel
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.runtime import (
    FLOATS,
    INTERPRET,
    Config,
    early,
    launch,
    rounding,
    triton,
    triton_op,
)

SEGMENT = 64
"""Rows of a segment of the candidate form."""

MAX_LEVELS = 4


def decode_reference(
    features: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    anchors: Tensor,
    layouts: list[int],
    strides: list[int],
    *options: Any,
) -> tuple[Tensor, Tensor]:
    """Level by level in plain PyTorch, exact always; arguments as in the operation."""
    _, conf = options
    rows, counts = [], []
    for i, layout in enumerate(_layouts(layouts)):
        x = layout.image_view(features[i]).float()
        y = F.linear(x, weights[i].float()) + biases[i]
        y = y.unflatten(3, (anchors.shape[1], y.shape[3] // anchors.shape[1]))
        s = y.permute(0, 3, 1, 2, 4).sigmoid()  # [B, A, H, W, 5 + nc]
        row = torch.arange(layout.h, device=x.device)[:, None].expand(layout.h, layout.w)
        column = torch.arange(layout.w, device=x.device).expand(layout.h, layout.w)
        centre = (2 * s[..., :2] - 0.5 + torch.stack((column, row), -1)) * strides[i]
        size = (2 * s[..., 2:4]) ** 2 * anchors[i, :, None, None]
        level = torch.cat((centre, size, s[..., 4:]), -1).flatten(2, 3)  # [B, A, H W, no]
        if conf is not None:
            level, count = _compact(level, conf)
            counts.append(count)
        rows.append(level.flatten(1, 2))
    empty = anchors.new_empty((rows[0].shape[0], 0), dtype=torch.int32)
    return torch.cat(rows, 1), torch.cat(counts, 1) if counts else empty


def _compact(level: Tensor, conf: float) -> tuple[Tensor, Tensor]:
    """Rows [B, A, P, no] with the survivors of each segment first, and their counts [B, S]."""
    level = F.pad(level, (0, 0, 0, -level.shape[2] % SEGMENT))  # objectness 0: none survives
    segments = level.unflatten(2, (level.shape[2] // SEGMENT, SEGMENT)).flatten(
        1, 2
    )  # [B, S, SEGMENT, no]
    keep = segments[..., 4] > conf
    order = (~keep).to(torch.uint8).argsort(dim=2, stable=True)
    segments = segments.gather(2, order[..., None].expand_as(segments))
    return segments, keep.sum(2, dtype=torch.int32)


def _layouts(sizes: Sequence[int]) -> list[PitchedLayout]:
    return [PitchedLayout(*sizes[i : i + 5]) for i in range(0, len(sizes), 5)]


def _segments(layout: PitchedLayout, anchors: int) -> int:
    return anchors * -(-layout.h * layout.w // SEGMENT)


def launch_decode(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    anchors: Tensor,
    layouts: Sequence[PitchedLayout],
    strides: Sequence[int],
    exact: bool,
    conf: float | None,
    rows: Tensor,
    counts: Tensor,
    config: Config,
) -> None:
    """Start the kernel; nothing is allocated or checked.

    The arguments up to `conf` are those of `decode`, `rows` and `counts` what it returns (counts
    are not written in the dense form); `config` has BLOCK_N, BLOCK_K, num_warps, num_stages.
    """
    count, first, levels = anchors.shape[1], 0, []
    for x, layout, stride in zip(features, layouts, strides, strict=True):
        sides = (layout.h, layout.w, layout.pitch, layout.row_pitch)
        levels.append(Level(*sides, x.shape[1], x.stride(0), stride, first))
        first += count * layout.h * layout.w if conf is None else _segments(layout, count)
    tiles = sum(-(-layout.h * layout.w // SEGMENT) for layout in layouts)
    args = {
        "x_ptrs": tuple(features),
        "weight_ptrs": tuple(weights),
        "bias_ptrs": tuple(biases),
        "anchors_ptr": anchors,
        "rows_ptr": rows,
        "counts_ptr": None if conf is None else counts,
        "levels": tuple(levels),
        "anchors": count,
        "total": rows.shape[1],
        "segments": counts.shape[1],
        "outputs": rows.shape[2],
        "conf": 0.0 if conf is None else conf,
        "LEVELS": len(features),
        "PRECISION": rounding(features[0], exact=exact),
        "PROMOTE": INTERPRET and features[0].dtype == torch.bfloat16,
        "BLOCK_M": SEGMENT,
    }
    options = {**config, **early(rows.device)}
    launch(decode_kernel, (tiles, count, layouts[0].n), args, options)


def _config(x: Tensor, outputs: int, exact: bool) -> Config:
    block_n = min(64 if exact else 128, max(16, triton.next_power_of_2(outputs)))
    block_k = 16 if exact else min(64, 128 // x.element_size())
    return {"BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": 8, "num_stages": 3}


def _decode_triton(
    features: list[Tensor],
    weights: list[Tensor],
    biases: list[Tensor],
    anchors: Tensor,
    layouts: list[int],
    strides: list[int],
    exact: bool,
    conf: float | None,
) -> tuple[Tensor, Tensor]:
    rows, counts = _decode_fake(features, weights, biases, anchors, layouts, strides, exact, conf)
    launch_decode(
        features, weights, biases, anchors, _layouts(layouts), strides, exact, conf,
        rows, counts, _config(features[0], rows.shape[2], exact),
    )  # fmt: skip
    return rows, counts


def _decode_fake(
    features: list[Tensor], weights: list[Tensor], *arguments: Any
) -> tuple[Tensor, Tensor]:
    _, anchors, layouts, _, _, conf = arguments
    count = anchors.shape[1]
    if conf is None:
        segments, rows = 0, sum(count * at.h * at.w for at in _layouts(layouts))
    else:
        segments = sum(_segments(at, count) for at in _layouts(layouts))
        rows = segments * SEGMENT
    shape = (layouts[0], rows, weights[0].shape[0] // count)
    counts = features[0].new_empty((layouts[0], segments), dtype=torch.int32)
    return features[0].new_empty(shape, dtype=torch.float32), counts


_decode_op = triton_op("decode", _decode_triton, decode_reference, _decode_fake)


def _check(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    anchors: Tensor,
    layouts: Sequence[PitchedLayout],
    strides: Sequence[int],
) -> None:
    levels = len(features)
    if not 1 <= levels <= MAX_LEVELS or not len(weights) == len(biases) == levels:
        raise ValueError(f"{levels} features, {len(weights)} weights, {len(biases)} biases")
    if not len(layouts) == len(strides) == levels:
        raise ValueError(f"{levels} levels, but {len(layouts)} layouts, {len(strides)} strides")
    if anchors.ndim != 3 or anchors.shape[0] != levels or anchors.shape[2] != 2:
        raise ValueError(f"anchors are {list(anchors.shape)}, not [{levels}, A, 2]")
    outputs = weights[0].shape[0]
    if outputs % anchors.shape[1] or outputs < 6 * anchors.shape[1]:
        raise ValueError(f"{outputs} outputs are not {anchors.shape[1]} anchors x (5 + classes)")
    for i, (x, weight, layout) in enumerate(zip(features, weights, layouts, strict=True)):
        layout.check(x, f"features {i}")
        if (
            x.dtype not in FLOATS.values()
            or weight.dtype != x.dtype
            or x.dtype != features[0].dtype
        ):
            raise ValueError(f"level {i}: features {x.dtype}, weight {weight.dtype}")
        if list(weight.shape) != [outputs, x.shape[1]] or layout.n != layouts[0].n:
            raise ValueError(
                f"level {i}: weight {list(weight.shape)}, features {list(x.shape)} of {layout.n} "
                f"images; expected [{outputs}, {x.shape[1]}] and {layouts[0].n}"
            )
        if list(biases[i].shape) != [outputs] or biases[i].dtype != torch.float32:
            raise ValueError(
                f"level {i}: bias {biases[i].dtype} {list(biases[i].shape)}, not fp32 [{outputs}]"
            )
    tensors = (*features, *weights, *biases, anchors)
    if any(tensor.device != features[0].device for tensor in tensors):
        raise ValueError(f"devices differ: {sorted({str(t.device) for t in tensors})}")


def decode(
    features: Sequence[Tensor],
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    anchors: Tensor,
    layouts: Sequence[PitchedLayout],
    strides: Sequence[int],
    *,
    exact: bool = False,
    conf: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Detection head over all levels.

    Args:
        features: pitched maps [rows, c] of one type, fp32, fp16 or bf16, a level each, at most 4.
        weights: [A (5 + nc), c] each, of the features' type; outputs of an anchor side by side.
        biases: [A (5 + nc)] fp32 each.
        anchors: [levels, A, 2] fp32, width and height in pixels.
        layouts: where each level's pixels lie.
        strides: pixels of the image per pixel of each level.
        exact: multiply fp32 exactly instead of as TF32.
        conf: objectness that a row must exceed in the candidate form; None for the dense form.

    Returns:
        The dense form [B, N, 5 + nc] fp32 and empty counts [B, 0]; or the candidate form
        [B, 64 S, 5 + nc] and counts [B, S] int32, of which the rows beyond a count are undefined:
        `batched_nms(rows, segment_counts=counts)` takes it.

    Raises:
        ValueError: shapes, types, devices or the number of levels do not fit.
    """
    _check(features, weights, biases, anchors, layouts, strides)
    result: tuple[Tensor, Tensor] = _decode_op(
        list(features),
        [weight.contiguous() for weight in weights],
        list(biases),
        anchors.float().contiguous(),
        [side for layout in layouts for side in layout.sizes],
        list(strides),
        exact,
        conf,
    )
    return result


def compile_cases(
    size: int = 640, nc: int = 80, batch: int = 1, precision: str = "fp16"
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches to compile ahead of time, see `yolov7.kernels.runtime.CompileSpec`."""
    channels, strides, outputs = (256, 512, 1024), [8, 16, 32], 3 * (5 + nc)
    layouts = [PitchedLayout.of(batch, size // stride, size // stride) for stride in strides]
    dtype = FLOATS.get(precision, torch.float16)
    features = [
        layout.empty(c, dtype=dtype, device="meta")
        for c, layout in zip(channels, layouts, strict=True)
    ]
    weights = [torch.empty((outputs, c), dtype=dtype, device="meta") for c in channels]
    biases = [torch.empty(outputs, device="meta")] * 3
    anchors = torch.empty((3, 3, 2), device="meta")
    sizes = [side for layout in layouts for side in layout.sizes]
    for exact in (False, True) if precision == "fp32" else (False,):
        for conf in (None, 0.25):
            form = "dense" if conf is None else "candidates"
            name = f"{form} {batch}x{size}x{size} {nc} classes {precision}"
            call = partial(_decode_triton, features, weights, biases, anchors, sizes)
            yield f"{name}{' exact' if exact else ''}", partial(call, strides, exact, conf)
