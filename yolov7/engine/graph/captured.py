"""From uint8 frames to boxes in their own pixels: letterbox, network, decoding, suppression.

On CUDA all of it is one graph that is captured once and replayed; the host only copies frames in
and boxes out. Frames travel through pinned memory and one of two staging buffers on a stream of
their own, so that the next frames go up while the graph works on the last ones. On a CPU the same
operations run one after the other through their references.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from yolov7.engine.eager import PLANS, Network
from yolov7.engine.graph.planned import PlannedNetwork
from yolov7.kernels.letterbox import letterbox
from yolov7.kernels.nms import batched_nms
from yolov7.letterbox import Geometry, Image

STAGES = 2  # batches of frames in flight


@dataclass(frozen=True)
class Suppression:
    """What non-maximum suppression keeps; see `yolov7.kernels.nms.batched_nms`."""

    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 300
    max_candidates: int = 30000
    agnostic: bool = False
    classes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Found:
    """Detections of a batch, on the CPU.

    Attributes:
        boxes: [B, max_det, 6] fp32: x1, y1, x2, y2 in pixels of each frame, score, class.
        counts: [B] int32, how many of them there are.
        overflow: [B] int32, candidates beyond the capacity, which were not looked at.
    """

    boxes: Tensor
    counts: Tensor
    overflow: Tensor


class Pending:
    """Detections under way."""

    def __init__(self, found: Found, done: torch.cuda.Event | None) -> None:
        self._found, self._done = found, done

    def wait(self) -> Found:
        """The detections, when they have come."""
        if self._done is not None:
            self._done.synchronize()
        return self._found


class FramePipeline:
    """Detects in frames; several threads may use one.

    Args:
        network: for one batch and size.
        suppression: what is kept.
        capacity: bytes of all frames of a batch at most.

    Attributes:
        output: detections of the latest batch, on the network's device.
    """

    output: Found

    def __init__(self, network: PlannedNetwork, suppression: Suppression, *, capacity: int) -> None:
        self.network, self.suppression, self.capacity = network, suppression, capacity
        self._lock = threading.Lock()
        device, batch = network.device, network.plan.batch
        self._cuda = device.type == "cuda"
        self._pixels = torch.zeros(capacity, dtype=torch.uint8, device=device)
        self._table = torch.tensor([[0, 1, 1, 0, 0, 1, 1]] * batch, device=device)
        # Left and top of the frame in the letterbox, scale, width and height of the frame.
        self._frame = torch.tensor([[0.0, 0, 1, 1, 1, 1]] * batch, device=device)
        ids = suppression.classes
        self._classes = None if ids is None else torch.tensor(ids, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if self._cuda:
            self._stages = [torch.empty_like(self._pixels) for _ in range(STAGES)]
            self._pinned = [torch.empty(capacity, dtype=torch.uint8).pin_memory() for _ in "ab"]
            self._free = [torch.cuda.Event() for _ in range(STAGES)]
            self._uploads = torch.cuda.Stream(device)
            self._stream = torch.cuda.Stream(device)
            self._next = 0
            self._capture()

    def stages(self) -> dict[str, Callable[[], None]]:
        """The parts of the way in order, to be timed; run one after the other they are the way."""
        return {
            "letterbox": self._letterbox,
            "network": self.network.run,
            "decode": self._decode,
            "nms": self._suppress,
        }

    def _letterbox(self) -> None:
        letterbox(self._pixels, self._table, self.network.images)

    def _decode(self) -> None:
        self._candidates = self.network.decode(self.suppression.conf)

    def _suppress(self) -> None:
        s = self.suppression
        rows, segment_counts = self._candidates
        found = batched_nms(
            rows,
            conf=s.conf,
            iou=s.iou,
            agnostic=s.agnostic,
            classes=self._classes,
            max_det=s.max_det,
            max_candidates=s.max_candidates,
            segment_counts=segment_counts,
        )
        pad, scale, size = self._frame[:, None, None].unflatten(-1, (3, 2)).unbind(-2)
        corners = (found.boxes[..., :4].unflatten(-1, (2, 2)) - pad) / scale
        corners = torch.minimum(corners.clamp_min(0), size)
        boxes = torch.cat([corners.flatten(-2), found.boxes[..., 4:]], -1)
        self.output = Found(boxes, found.counts, found.overflow)

    def _run(self) -> None:
        """The whole way, on whatever device the tensors are."""
        for stage in self.stages().values():
            stage()

    @torch.no_grad()
    def _capture(self) -> None:
        """Run once, which compiles the kernels, then record."""
        self._stream.wait_stream(torch.cuda.current_stream(self._pixels.device))  # the weights
        with torch.cuda.stream(self._stream):
            self._run()
            self._stream.synchronize()
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph, stream=self._stream):
                self._run()
            self._captured = self.output  # stages run by hand put another there

    @torch.no_grad()
    def submit(self, frames: Sequence[Tensor], boxes: Sequence[Geometry]) -> Pending:
        """Start detecting.

        Args:
            frames: [h, w, 3] uint8 BGR each, on the CPU or the device; `batch` of them or fewer.
            boxes: each frame's letterbox, of the network's height and width.

        Raises:
            ValueError: more frames than the batch, or more bytes than the capacity.
        """
        batch = self.network.plan.batch
        if not 0 < len(frames) <= batch or len(frames) != len(boxes):
            raise ValueError(f"{len(frames)} frames and {len(boxes)} boxes for a batch of {batch}")
        if sum(frame.numel() for frame in frames) > self.capacity:
            raise ValueError(f"frames of more than {self.capacity} bytes")
        table, geometry, offset = [], [], 0
        for frame, box in zip(frames, boxes, strict=True):
            top, _, left, _ = box.border
            height, width = frame.shape[:2]
            table.append([offset, height, width, top, left, *box.size])
            geometry.append([*box.pad, *box.ratio, width, height])
            offset += frame.numel()
        missing = batch - len(frames)  # repeated, and left out of the result
        tables = torch.tensor(table + table[:1] * missing)
        geometries = torch.tensor(geometry + geometry[:1] * missing)
        with self._lock:
            if self._cuda:
                return self._replay(frames, tables, geometries)
            self._pixels[:offset] = torch.cat([frame.flatten() for frame in frames])
            self._table.copy_(tables)
            self._frame.copy_(geometries)
            self._run()
            n, found = len(frames), self.output
        return Pending(Found(found.boxes[:n], found.counts[:n], found.overflow[:n]), None)

    def _replay(self, frames: Sequence[Tensor], table: Tensor, geometry: Tensor) -> Pending:
        assert self._graph is not None
        index, self._next = self._next, (self._next + 1) % STAGES
        stage, pinned, free = self._stages[index], self._pinned[index], self._free[index]
        free.synchronize()  # until what went through this stage is in the graph's input
        self._uploads.wait_stream(torch.cuda.current_stream(stage.device))  # which made the frames
        with torch.cuda.stream(self._uploads):
            offset = 0
            for frame in frames:
                end = offset + frame.numel()
                source = frame.flatten()
                if frame.is_cuda:
                    frame.record_stream(self._uploads)
                else:
                    source = pinned[offset:end].copy_(source)
                stage[offset:end].copy_(source, non_blocking=True)
                offset = end
            table = table.pin_memory().to(stage.device, non_blocking=True)
            geometry = geometry.pin_memory().to(stage.device, non_blocking=True)
            for upload in (table, geometry):  # the next batch must not be given their memory
                upload.record_stream(self._stream)
            uploaded = self._uploads.record_event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(uploaded)
            self._pixels[:offset].copy_(stage[:offset])
            self._table.copy_(table)
            self._frame.copy_(geometry)
            free.record(self._stream)
            self._graph.replay()
            n = len(frames)
            out = self.output = self._captured
            outputs = (out.boxes, out.counts, out.overflow)
            found = Found(*(o[:n].to("cpu", non_blocking=True) for o in outputs))
            done = self._stream.record_event()
        return Pending(found, done)


class Pipelines:
    """Captured pipelines from frames to boxes; the latest few are kept.

    Args:
        network: With the engine "graph".
        batch: Images at a time.
        suppression: What is kept.
    """

    def __init__(self, network: Network, batch: int, suppression: Suppression) -> None:
        self._network, self._batch, self._suppression = network, batch, suppression
        self._pipelines: dict[tuple[int, int], FramePipeline] = {}

    def submit(self, images: Sequence[Image], geometries: Sequence[Geometry]) -> Pending:
        """Start detecting in at most ``batch`` images that have letterboxes of one shape."""
        shape = geometries[0].shape
        size = self._batch * max(image.size for image in images)
        pipeline = self._pipelines.pop(shape, None)
        if pipeline is None or pipeline.capacity < size:
            if self._network.device.type == "cuda":
                # What is under way may use the buffers that a new pipeline shares or frees.
                torch.cuda.synchronize(self._network.device)
            if len(self._pipelines) == PLANS:
                del self._pipelines[next(iter(self._pipelines))]
            network = self._network.planned(self._batch, *shape)
            pipeline = FramePipeline(network, self._suppression, capacity=size)
        self._pipelines[shape] = pipeline
        return pipeline.submit([torch.from_numpy(image) for image in images], geometries)
