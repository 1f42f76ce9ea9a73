"""Frames to the network's input: scaled, framed in grey, RGB, divided by 255."""

from collections.abc import Sequence
from functools import partial

import cv2
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.comparison import Comparison, close
from yolov7.benchmark.clock import Run, Work, captured
from yolov7.engine.frames import apart, letterbox_tables, to_input
from yolov7.kernels.letterbox import letterbox
from yolov7.letterbox import GREY, Geometry, letterbox_geometry
from yolov7.letterbox import letterbox as letterbox_cpu

BATCHES = (1, 16) if torch.cuda.is_available() else (1,)


def eager(frames: Sequence[Tensor], geometry: Geometry, dtype: torch.dtype) -> Tensor:
    """The same in PyTorch's operations, image by image."""
    top, bottom, left, right = geometry.border
    images = []
    for frame in frames:
        image = frame.flip(2).permute(2, 0, 1)[None].float()
        image = F.interpolate(image, geometry.size, mode="bilinear", align_corners=False)
        images.append(F.pad(image, (left, right, top, bottom), value=GREY))
    return torch.cat(images).div_(255).to(dtype)


def on_cpu(frames: Sequence[np.ndarray], size: int) -> Tensor:
    """As the detector prepares frames on a CPU."""
    boxed = [letterbox_cpu(f, letterbox_geometry(f.shape[:2], size)) for f in frames]
    return to_input(boxed, torch.device("cpu"), torch.float32)


@pytest.mark.parametrize("batch", BATCHES, ids="1080p to 640, batch {}".format)
def bench_letterbox(batch: int, compete: Comparison, device: torch.device, smoke: bool) -> None:
    """Ours (OpenCV on a CPU) beside PyTorch's operations."""
    (height, width), size = ((27, 48), 32) if smoke else ((1080, 1920), 640)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (batch, height // 9, width // 9, 3), np.uint8)
    frames = [cv2.resize(frame, (width, height)) for frame in coarse]
    tensors = [torch.from_numpy(frame).to(device) for frame in frames]
    geometry = letterbox_geometry((height, width), size)
    plain = captured(partial(eager, tensors, geometry, dtype), device)
    ours: Run = partial(on_cpu, frames, size)
    if device.type != "cpu":
        pixels = torch.cat([frame.flatten() for frame in tensors])
        table, _ = apart(letterbox_tables(tensors, [geometry] * batch).to(device))
        out = torch.empty(batch, 3, size, size, dtype=dtype, device=device)
        ours = captured(partial(letterbox, pixels, table, out), device)
    box = geometry.size
    moved = min(2 * box[0], height) * width * 3 + 3 * size * size * dtype.itemsize
    compete(
        {"ours": ours, "eager": plain},
        agree=close(1e-2),
        work=Work(bytes=batch * moved, items=batch),
    )
