"""The one way from frames to boxes, on the host; `graph.captured` is the same as one graph.

Whoever turns frames into boxes asks a `Frames`: the detector, tiles, evaluation, benchmarks. It
prepares images (any thread may), takes a batch of them with their letterboxes, and gives boxes in
pixels of the frames. `choose.open_frames` chooses which of the two it is.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import cv2
import numpy as np
import torch
from torch import Tensor

from yolov7.boxes import frame_table
from yolov7.engine.faults import require_living_device, warn
from yolov7.errors import first_line
from yolov7.kernels.letterbox import frame_rows
from yolov7.kernels.letterbox import letterbox as letterbox_on_device
from yolov7.kernels.nms import Detections
from yolov7.kernels.runtime import HAS_TRITON
from yolov7.letterbox import Geometry, Image, letterbox
from yolov7.suppression import Suppression

SAME_BOXES = 1e-2  # pixels, or score: between suppression on a device and on the CPU

Pixels = Image | Tensor
"""[H, W, 3] uint8 BGR: in memory, or a tensor on a GPU, which stays there."""


@dataclass(frozen=True)
class Found:
    """Detections of a batch, on the CPU.

    Attributes:
        boxes: [B, max_det, 6] fp32: x1, y1, x2, y2 in pixels of each frame, score, class; rows
            beyond the count are of no meaning.
        counts: [B] int32, how many of them there are.
        overflow: [B] int32, candidates beyond the capacity, which were not looked at.
        ms: Milliseconds of the batch by stage: "pre" (to the device, RGB in 0..1), "network" and
            "nms"; of a captured graph "whole".
    """

    boxes: Tensor
    counts: Tensor
    overflow: Tensor
    ms: dict[str, float]

    def rows(self) -> Iterator[tuple[Tensor, int]]:
        """Of every frame the boxes [n, 6], and the candidates that were not looked at."""
        counts, overflow = self.counts.tolist(), self.overflow.tolist()
        for boxes, count, beyond in zip(self.boxes, counts, overflow, strict=True):
            yield boxes[:count], beyond


class Pending(Protocol):
    """Detections under way."""

    def wait(self) -> Found:
        """The detections, when they have come."""
        ...


class Frames(Protocol):
    """From frames to boxes in their own pixels."""

    @property
    def in_flight(self) -> int:
        """Batches that `submit` takes before the first is waited for, at its fastest."""
        ...

    def prepare(self, pixels: Pixels, geometry: Geometry) -> Pixels:
        """What `submit` takes of an image; any thread may call it."""
        ...

    def submit(self, prepared: Sequence[Pixels], where: Sequence[Geometry]) -> Pending:
        """Start detecting in images whose letterboxes have one shape; at most the batch."""
        ...


class Forward(Protocol):
    """Images x [B, 3, H, W], RGB in 0..1, to decoded boxes [B, N, 5 + classes] in fp32.

    Attributes:
        device: Where it takes its input.
        dtype: Of the input.
        one_shape: Whether every input should have the same shape.
        names: Class names by number.
        stride: Sides of the input are multiples of it.
    """

    device: torch.device
    dtype: torch.dtype
    one_shape: bool
    names: list[str]
    stride: int

    def __call__(self, x: Tensor, /) -> Tensor:
        """The decoded boxes."""
        ...


def to_input(
    images: Sequence[Image], device: torch.device, dtype: torch.dtype, *, batch: int | None = None
) -> Tensor:
    """Letterboxed images, BGR uint8 of one shape, as [B, 3, h, w] on a device, RGB in 0..1.

    Args:
        images: [h, w, 3] each.
        device: Where they are wanted.
        dtype: In which they are wanted.
        batch: B, the missing ones black; None: as many as there are.
    """
    pixels = np.zeros((batch or len(images), *images[0].shape), np.uint8)
    for image, target in zip(images, pixels, strict=False):
        cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=target)
    x = torch.from_numpy(pixels).to(device).permute(0, 3, 1, 2)
    return x.to(dtype).div_(255)


def same_boxes(found: Detections | Found, expected: Detections) -> bool:
    """Whether suppression on a device found what it finds on the CPU; rows beyond are ignored."""
    n = len(found.boxes)
    return torch.equal(found.counts, expected.counts[:n]) and torch.allclose(
        found.boxes, expected.boxes[:n], rtol=0, atol=SAME_BOXES
    )


def same_input(x: Tensor, frames: Sequence[Pixels], where: Sequence[Geometry]) -> bool:
    """Whether the network's input x [B, 3, h, w] is what OpenCV makes of the frames."""
    arrays = [frame.cpu().numpy() if isinstance(frame, Tensor) else frame for frame in frames]
    boxed = [letterbox(frame, geometry) for frame, geometry in zip(arrays, where, strict=True)]
    expected = to_input(boxed, torch.device("cpu"), x.dtype)
    difference = (x[: len(frames)].cpu().float() - expected.float()).abs().max()
    return float(difference) < 1.5 / 255  # a pixel may be rounded the other way


def equal_shapes(shapes: Sequence[tuple[int, ...]], batch: int) -> Iterator[list[int]]:
    """Indices of what has equal shapes, at most ``batch`` at a time."""
    if len(shapes) == 1:
        yield [0]
        return
    equal: dict[tuple[int, ...], list[int]] = {}
    for index, shape in enumerate(shapes):
        equal.setdefault(shape, []).append(index)
    for indices in equal.values():
        for start in range(0, len(indices), batch):
            yield indices[start : start + batch]


@dataclass(frozen=True)
class Done:
    """Detections that are there."""

    found: Found

    def wait(self) -> Found:
        """The detections."""
        return self.found


class HostFrames:
    """Letterbox by OpenCV, the network, suppression: one after the other.

    On a GPU suppression is a kernel, and so is the letterbox of frames that are there. Where that
    cannot be had, or gives other boxes for the first batch than its reference on the CPU, there is
    one warning, and the CPU does it.

    Args:
        network: What is run.
        suppression: What is kept.
        batch: Images at a time; a network of one shape is given that many always.
    """

    in_flight = 0

    def __init__(self, network: Forward, suppression: Suppression, batch: int = 1) -> None:
        self.network = network
        self.suppression = suppression
        self._batch = batch if network.one_shape else None
        self._suppress = suppression.on(torch.device("cpu"))
        self._kernels = network.device.type == "cuda" and HAS_TRITON
        self._proven = self._letterbox_proven = False
        if self._kernels:
            self._suppress_there = suppression.on(network.device)

    def prepare(self, pixels: Pixels, geometry: Geometry) -> Pixels:
        """Letterbox an image; one on a GPU waits for its batch."""
        if isinstance(pixels, Tensor):
            if self._kernels:
                return pixels.to(self.network.device)
            pixels = pixels.cpu().numpy()
        return letterbox(pixels, geometry)

    @torch.no_grad()
    def submit(self, prepared: Sequence[Pixels], where: Sequence[Geometry]) -> Done:
        """Detect."""
        decoded, ms = self.decode(prepared, where)
        start = self._now()
        found = self.suppress(decoded, frame_table(where))
        ms["nms"] = self._now() - start
        return Done(Found(*found, ms))

    def decode(
        self, prepared: Sequence[Pixels], where: Sequence[Geometry]
    ) -> tuple[Tensor, dict[str, float]]:
        """Boxes [B, N, 5 + classes] in pixels of the letterboxes; ms of "pre" and "network"."""
        start = self._now()
        x = self._input(prepared, where)
        ready = self._now()
        decoded = self.network(x)[: len(where)]
        return decoded, {"pre": ready - start, "network": self._now() - ready}

    def suppress(self, decoded: Tensor, frames: Tensor | None = None) -> Detections:
        """What is kept of decoded boxes [B, N, 5 + classes], on the CPU.

        Args:
            decoded: In pixels of the letterboxes.
            frames: `frame_table` of the frames in whose pixels boxes are wanted, on the CPU.
        """
        if self._kernels:
            try:
                there = None if frames is None else frames.to(decoded.device)
                kept = self._suppress_there(decoded, frames=there)
                found = Detections(*(part.cpu() for part in kept))
                if self._proven or same_boxes(found, self._suppress(decoded.cpu(), frames=frames)):
                    self._proven = self._proven or bool(found.counts.any())  # none proves none
                    return found
                self._leave_kernels("the first batch got other boxes than on the CPU")
            except Exception as error:  # whatever a compiler or a driver throws
                self._leave_kernels(first_line(error))
        return self._suppress(decoded.cpu(), frames=frames)

    def stages(
        self, images: Sequence[Image], where: Sequence[Geometry]
    ) -> dict[str, Callable[[], object]]:
        """The parts of the way in order, to be timed; run one after the other they are the way."""
        kept: dict[str, list[Pixels] | Tensor] = {}

        def box() -> None:
            pairs = zip(images, where, strict=True)
            kept["boxed"] = [self.prepare(image, geometry) for image, geometry in pairs]

        def upload() -> None:
            kept["x"] = self._input(list(kept["boxed"]), where)

        def network() -> None:
            kept["decoded"] = self.network(torch.as_tensor(kept["x"]))

        def nms() -> None:
            self.suppress(torch.as_tensor(kept["decoded"]))

        return {"letterbox": box, "upload": upload, "network": network, "nms": nms}

    def _input(self, prepared: Sequence[Pixels], where: Sequence[Geometry]) -> Tensor:
        there = [pixels for pixels in prepared if isinstance(pixels, Tensor)]
        if self._kernels and there and len(there) == len(prepared):
            try:
                x = self._input_there(there, where)
                if self._letterbox_proven or same_input(x, prepared, where):
                    self._letterbox_proven = self._letterbox_proven or bool(x.std() > 0.1)
                    return x
                self._leave_kernels("the letterbox is another than OpenCV's")
            except Exception as error:  # whatever a compiler or a driver throws
                self._leave_kernels(first_line(error))
        images = [
            letterbox(pixels.cpu().numpy(), geometry) if isinstance(pixels, Tensor) else pixels
            for pixels, geometry in zip(prepared, where, strict=True)
        ]
        return to_input(images, self.network.device, self.network.dtype, batch=self._batch)

    def _input_there(self, frames: Sequence[Tensor], where: Sequence[Geometry]) -> Tensor:
        """The network's input of frames that are on its device, letterboxed there."""
        table, _ = apart(letterbox_tables(frames, where))
        pixels = torch.cat([frame.flatten() for frame in frames])
        x = torch.zeros(
            (self._batch or len(frames), 3, *where[0].shape),
            dtype=self.network.dtype,
            device=self.network.device,
        )
        letterbox_on_device(pixels, table.to(x.device), x[: len(frames)])
        return x

    def _leave_kernels(self, reason: str) -> None:
        self._kernels = False
        require_living_device(self.network.device, reason)
        warn(f"letterbox and suppression are left to the CPU: {reason}")

    def _now(self) -> float:
        """Milliseconds, when everything before is done."""
        return milliseconds(self.network.device)


def letterbox_tables(images: Sequence[Pixels], where: Sequence[Geometry], batch: int = 0) -> Tensor:
    """What the letterbox kernel and suppression have to know, on the CPU.

    Args:
        images: [h, w, 3] each, which lie one behind the other.
        where: Their letterboxes.
        batch: Rows, if more than images: the first one is repeated.

    Returns:
        `frame_table` [B, 3, 4] and `frame_rows` [B, 9] as bits in one int64 [15 B], for one upload.
    """
    rows, offset = [], 0
    for image, geometry in zip(images, where, strict=True):
        top, _, left, _ = geometry.border
        height, width, channels = image.shape
        rows.append([offset, height, width, top, left, *geometry.size])
        offset += height * width * channels
    missing = max(batch - len(images), 0)
    table = frame_table([*where, *[where[0]] * missing]).view(torch.int64)
    return torch.cat((table.flatten(), frame_rows(rows + rows[:1] * missing).flatten()))


def apart(tables: Tensor) -> tuple[Tensor, Tensor]:
    """`frame_rows` [B, 9] and `frame_table` [B, 3, 4] of `letterbox_tables`, in its memory."""
    batch = len(tables) // 15
    frames, rows = tables[: 6 * batch], tables[6 * batch :]
    return rows.view(batch, 9), frames.view(torch.float32).view(batch, 3, 4)


def milliseconds(device: torch.device) -> float:
    """The host's clock, when everything before is done on the device."""
    if device.type == "cuda":
        # Of the stream, not of the device: that would end a capture of another thread.
        torch.cuda.current_stream(device).synchronize()
    elif device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter() * 1e3
