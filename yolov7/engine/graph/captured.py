"""The way from frames to boxes by one plan; on CUDA one graph, captured once and replayed.

The host only copies frames in and boxes out. Frames travel through pinned memory and one of two
staging buffers on a stream of their own, so that the next frames go up while the graph works on the
last ones; frames that are on the device already are copied there. On a CPU the same operations run
one after the other through their references.
"""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from yolov7.engine.faults import lost
from yolov7.engine.frames import Done, Found, Pending, Pixels, apart, letterbox_tables
from yolov7.engine.graph.planned import PlannedNetwork
from yolov7.errors import first_line
from yolov7.kernels.letterbox import letterbox
from yolov7.kernels.nms import Detections
from yolov7.letterbox import Geometry, Image, letterbox_geometry
from yolov7.suppression import Suppression

STAGES = 2  # batches of frames in flight


class UnderWay:
    """Detections that a device is working on, and the events around the work."""

    def __init__(self, found: Detections, start: torch.cuda.Event, done: torch.cuda.Event) -> None:
        self._found, self._start, self._done = found, start, done

    def wait(self) -> Found:
        """The detections, when they have come.

        Raises:
            UserError: The device has failed.
        """
        try:
            self._done.synchronize()
        except RuntimeError as error:
            raise lost(torch.device("cuda"), first_line(error)) from None
        return Found(*self._found, {"whole": self._start.elapsed_time(self._done)})


class FramePipeline:
    """Detects in frames by one plan; whoever uses it holds the lock of the plan's network.

    Args:
        network: For one batch and size.
        suppression: What is kept.
        capacity: Bytes of all frames of a batch at most.
        stream: On CUDA, on which all that uses the plan works.

    Attributes:
        output: Detections of the latest batch, on the network's device.
        checks: How often its results were compared with the host's way.
    """

    output: Detections
    checks = 0

    def __init__(
        self,
        network: PlannedNetwork,
        suppression: Suppression,
        *,
        capacity: int,
        stream: torch.cuda.Stream | None = None,
    ) -> None:
        self.network, self.suppression, self.capacity = network, suppression, capacity
        device, batch = network.device, network.plan.batch
        self._cuda = device.type == "cuda"
        self._pixels = torch.zeros(capacity, dtype=torch.uint8, device=device)
        pixel, height, width = np.zeros((1, 1, 3), np.uint8), *network.images.shape[2:]
        where = letterbox_geometry((1, 1), (height, width))
        self._tables = letterbox_tables([pixel], [where], batch).to(device)
        self._table, self._frames = apart(self._tables)
        self._suppression = suppression.on(device)
        self._graph: torch.cuda.CUDAGraph | None = None
        if self._cuda:
            self._stages = [torch.empty_like(self._pixels) for _ in range(STAGES)]
            self._pinned = [torch.empty(capacity, dtype=torch.uint8).pin_memory() for _ in "ab"]
            self._free = [torch.cuda.Event() for _ in range(STAGES)]
            self._uploads = torch.cuda.Stream(device)
            self._stream = stream or torch.cuda.Stream(device)
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

    def expected(self, decoded: Tensor) -> Detections:
        """What the references on the CPU keep of the decoded boxes of the latest batch."""
        suppress = self.suppression.on(torch.device("cpu"))
        return suppress(decoded.cpu(), frames=self._frames.cpu())

    def _letterbox(self) -> None:
        letterbox(self._pixels, self._table, self.network.images)

    def _decode(self) -> None:
        self._candidates = self.network.decode(self.suppression.conf)

    def _suppress(self) -> None:
        rows, segment_counts = self._candidates
        self.output = self._suppression(rows, segment_counts, self._frames)

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
            # Other threads may allocate meanwhile.
            with torch.cuda.graph(
                self._graph, stream=self._stream, capture_error_mode="thread_local"
            ):
                self._run()
            self._captured = self.output  # stages run by hand put another there

    @torch.no_grad()
    def submit(self, frames: Sequence[Pixels], where: Sequence[Geometry]) -> Pending:
        """Start detecting.

        Args:
            frames: [h, w, 3] uint8 BGR each, in memory or on the device; `batch` of them or fewer.
            where: Each frame's letterbox, of the network's height and width.

        Raises:
            ValueError: More frames than the batch, or more bytes than the capacity.
        """
        batch, count = self.network.plan.batch, len(frames)
        if not 0 < count <= batch or count != len(where):
            raise ValueError(f"{count} frames and {len(where)} boxes for a batch of {batch}")
        if sum(map(byte_count, frames)) > self.capacity:
            raise ValueError(f"frames of more than {self.capacity} bytes")
        tensors = [f if isinstance(f, Tensor) else from_array(f) for f in frames]
        tables = letterbox_tables(frames, where, batch)  # missing frames are left out of the result
        if self._cuda:
            return self._replay(tensors, tables)
        start = time.perf_counter()
        offset = 0
        for frame in tensors:
            self._pixels[offset : offset + frame.numel()].copy_(frame.flatten())
            offset += frame.numel()
        self._tables.copy_(tables)
        self._run()
        boxes, counts, overflow = (part[:count] for part in self.output)
        return Done(Found(boxes, counts, overflow, {"whole": 1e3 * (time.perf_counter() - start)}))

    def _replay(self, frames: Sequence[Tensor], tables: Tensor) -> UnderWay:
        assert self._graph is not None
        index, self._next = self._next, (self._next + 1) % STAGES
        stage, pinned, free = self._stages[index], self._pinned[index], self._free[index]
        free.synchronize()  # until what went through this stage is in the graph's input
        self._uploads.wait_stream(torch.cuda.current_stream(stage.device))  # which made the frames
        with torch.cuda.stream(self._uploads):
            start = self._uploads.record_event(torch.cuda.Event(enable_timing=True))
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
            tables = tables.pin_memory().to(stage.device, non_blocking=True)
            tables.record_stream(self._stream)  # the next batch must not be given its memory
            uploaded = self._uploads.record_event()
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(uploaded)
            self._pixels[:offset].copy_(stage[:offset])
            self._tables.copy_(tables)
            free.record(self._stream)
            self._graph.replay()
            self.output = self._captured
            parts = (part[: len(frames)] for part in self._captured)
            found = Detections(*(part.to("cpu", non_blocking=True) for part in parts))
            done = self._stream.record_event(torch.cuda.Event(enable_timing=True))
        return UnderWay(found, start, done)


def byte_count(pixels: Pixels) -> int:
    """Bytes of an image."""
    height, width, channels = pixels.shape
    return int(height) * int(width) * int(channels)


def from_array(image: Image) -> Tensor:
    """The image as a tensor, which PyTorch does not like to be of read-only memory."""
    return torch.from_numpy(image if image.flags.writeable else image.copy())
