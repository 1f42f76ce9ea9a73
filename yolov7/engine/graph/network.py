"""The engine graph as a network: its plans, its pipelines, and what happens where it fails.

Nothing of this has to succeed: see `GraphNetwork`.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from yolov7.engine.eager import Network
from yolov7.engine.faults import require_living_device, warn
from yolov7.engine.frames import HostFrames, Pending, Pixels, same_boxes, same_input
from yolov7.engine.graph.captured import STAGES, FramePipeline, byte_count
from yolov7.engine.graph.guard import why_wrong
from yolov7.engine.graph.planned import PlannedNetwork
from yolov7.errors import UserError, first_line
from yolov7.kernels.conv import LARGEST
from yolov7.kernels.runtime import DTYPE_NAMES, PRECISIONS
from yolov7.letterbox import Geometry, Image
from yolov7.model import YOLOv7
from yolov7.suppression import Suppression

PLANS = 8  # shapes that a network is ready for: test-time augmentation has six, upright and not
PIPELINES = 2  # of a plan, each for another suppression or larger frames
TRIES = 10  # batches in which a pipeline may find nothing before it counts as right

# Plans are made and ways captured by one thread at a time: what prepares one may end the capture
# of another.
_BUILDING = threading.RLock()


class EngineError(Exception):
    """The engine graph cannot do what is asked of it; the network is eager from now on."""


class GraphNetwork(Network):
    """A network that runs by plans, one for each input shape; the latest few are kept.

    Whatever fails while a plan is made, compiled, launched first or captured, and a first batch on
    a GPU whose result is far from the eager model's, is a warning, and the network is eager from
    then on; where the engine is ``required`` it is an error.

    One lock guards the plans and their buffers, and on CUDA all of them work on one stream, so
    several threads may use a network and what is made of it.

    Args:
        model: See `Network`.
        device: See `Network`.
        precision: See `Network`.
        required: Whether the user has asked for this engine by name.

    Attributes:
        lock: Held while plans are used.
        guarded: Whether the first batch of a plan is compared with the eager model.
    """

    engine = "graph"

    def __init__(
        self, model: YOLOv7, device: torch.device, precision: str, *, required: bool = True
    ) -> None:
        super().__init__(model, device, precision)
        self.required = required
        self.guarded = device.type == "cuda"
        self.lock = threading.RLock()
        self._plans: dict[tuple[int, int, int], _Plan] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, x: Tensor) -> Tensor:
        """Decoded boxes [B, N, 5 + classes] in fp32 of images x [B, 3, H, W], RGB in 0..1.

        Raises:
            ValueError: A side is not a multiple of the stride.
        """
        if x.ndim != 4 or x.shape[1] != 3 or any(side % self.stride for side in x.shape[2:]):
            raise ValueError(f"{list(x.shape)} is not [B, 3, H, W] in multiples of {self.stride}")
        decoded = self._by_plan(x)
        return super().__call__(x) if decoded is None else decoded

    @torch.no_grad()
    def _by_plan(self, x: Tensor) -> Tensor | None:
        """Decoded boxes; None once the network is eager."""
        try:
            with self.lock, self.attempt():
                return self._run(self._plan(x.shape[0], x.shape[2], x.shape[3]), x)
        except EngineError:
            return None

    def planned(self, batch: int, height: int, width: int) -> PlannedNetwork:
        """The plan for a shape.

        Raises:
            EngineError: There is none, and the network is eager from now on.
            UserError: There is none, and the engine is required.
        """
        with self.lock, self.attempt():
            return self._plan(batch, height, width).network

    def pipeline(
        self, batch: int, shape: tuple[int, int], suppression: Suppression, capacity: int
    ) -> FramePipeline:
        """The pipeline for a batch, a letterbox and at least so many bytes; see `planned`.

        The caller holds `lock`, and uses the pipeline inside `attempt`.
        """
        plan = self._plan(batch, *shape)
        pipeline = plan.pipelines.pop(suppression, None)
        if pipeline is None or pipeline.capacity < capacity:
            with _BUILDING:
                self._drain()
                if len(plan.pipelines) == PIPELINES:
                    del plan.pipelines[next(iter(plan.pipelines))]
                with torch.inference_mode(False):  # whoever makes the buffers, others may write
                    pipeline = FramePipeline(
                        plan.network, suppression, capacity=capacity, stream=self._stream
                    )
        plan.pipelines[suppression] = pipeline
        return pipeline

    @contextmanager
    def attempt(self) -> Iterator[None]:
        """Turn a failure into the engine's end: an `EngineError`, or a `UserError` if required."""
        if self.engine != "graph":
            raise EngineError
        try:
            yield
        except (UserError, EngineError):
            raise
        except Exception as error:  # whatever a compiler, a driver or an allocator throws
            self._fail(first_line(error))

    def check(
        self,
        pipeline: FramePipeline,
        pending: Pending,
        frames: Sequence[Pixels],
        where: Sequence[Geometry],
    ) -> None:
        """Compare a pipeline's first batch with the host's way; the caller holds `lock`.

        Args:
            pipeline: That is detecting.
            pending: What it will give.
            frames: In what.
            where: And where they lie in their letterboxes.
        """
        if pipeline.checks == TRIES or not self.guarded:
            return
        network, found = pipeline.network, pending.wait()
        if not same_input(network.images, frames, where):
            self._fail("the letterbox of a first batch is another than OpenCV's")
        decoded = network.decode()[0]
        if not pipeline.checks:
            self._compare(decoded, network.images)
        if not same_boxes(found, pipeline.expected(decoded)):
            self._fail("the boxes of a first batch are not those of the kernels' references")
        # A black frame proves nothing.
        pipeline.checks = TRIES if found.counts.any() else pipeline.checks + 1

    def _made_ready(self, model: YOLOv7) -> Callable[[Tensor], Tensor]:
        return model  # as it is: plans are made of its convolutions

    def _plan(self, *shape: int) -> "_Plan":
        plan = self._plans.pop(shape, None)  # type: ignore[arg-type]  # batch, height, width
        if plan is None:
            self._drain()  # what is under way uses memory that is free from here on
            if len(self._plans) == PLANS:
                del self._plans[next(iter(self._plans))]
            try:
                plan = self._made_plan(shape)
            except torch.OutOfMemoryError:
                if not self._plans:
                    raise
                self._plans.clear()  # others can be made again
                plan = self._made_plan(shape)
        self._plans[shape] = plan  # type: ignore[index]  # likewise
        return plan

    def _made_plan(self, shape: tuple[int, ...]) -> "_Plan":
        ranges = self._model.ranges.get(self.precision)
        with _BUILDING, torch.inference_mode(False), torch.no_grad(), self._on_stream():
            return _Plan(
                PlannedNetwork(
                    self._model,
                    *shape,
                    dtype=self.dtype,
                    device=self.device,
                    ranges=ranges,
                    narrow=PRECISIONS[self.precision],
                )
            )

    def _run(self, plan: "_Plan", x: Tensor) -> Tensor:
        x = x.to(self.device, self.dtype)
        with self._on_stream():
            decoded = plan.network(x)
            if self.guarded and not plan.checked:
                self._compare(decoded, x)
                plan.checked = True
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)
            decoded.record_stream(torch.cuda.current_stream(self.device))
        return decoded

    def _compare(self, decoded: Tensor, x: Tensor) -> None:
        expected = self._forward(x.contiguous(memory_format=torch.channels_last))
        size = (x.shape[2], x.shape[3])
        wrong = why_wrong(decoded, expected, self._model.head, size, self.precision)
        if wrong:
            self._fail(wrong)

    def _fail(self, reason: str) -> None:
        require_living_device(self.device, reason)
        if self.required:
            raise UserError(f"engine graph: {reason}: use --engine eager") from None
        self.engine, self._plans = "eager", {}
        if PRECISIONS[self.precision] in LARGEST:
            self.precision = DTYPE_NAMES[self.dtype]
        warn(f"engine graph is left for eager: {reason}")
        raise EngineError from None

    def _on_stream(self) -> AbstractContextManager[object]:
        """The stream on which all plans work, behind what the caller has queued."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _drain(self) -> None:
        if self._stream is not None:
            self._stream.synchronize()


@dataclass
class _Plan:
    """A plan, what was captured of it, and whether its first forward was right."""

    network: PlannedNetwork
    pipelines: dict[Suppression, FramePipeline] = field(default_factory=dict)
    checked: bool = False


class CapturedFrames:
    """Frames to boxes through captured graphs; through the host's way once that has failed.

    Args:
        network: With the engine graph.
        suppression: What is kept.
        batch: Images at a time.
    """

    def __init__(self, network: GraphNetwork, suppression: Suppression, batch: int) -> None:
        self.network, self.suppression, self._batch = network, suppression, batch
        self._host = HostFrames(network, suppression, batch)

    @property
    def in_flight(self) -> int:
        """One batch goes up while the graph works on the one before."""
        return STAGES - 1 if self.network.engine == "graph" else self._host.in_flight

    def prepare(self, pixels: Pixels, geometry: Geometry) -> Pixels:
        """Nothing, since the letterbox is part of the graph; or what the host's way does."""
        return pixels if self.network.engine == "graph" else self._host.prepare(pixels, geometry)

    def submit(self, prepared: Sequence[Pixels], where: Sequence[Geometry]) -> Pending:
        """Start detecting.

        Raises:
            ValueError: More images than the batch.
        """
        if not 0 < len(prepared) <= self._batch or len(prepared) != len(where):
            raise ValueError(
                f"{len(prepared)} images and {len(where)} letterboxes for a batch of {self._batch}"
            )
        pending = self._by_graph(prepared, where)
        if pending is not None:
            return pending
        pairs = zip(prepared, where, strict=True)
        # One that has the letterbox's shape is one, prepared since the engine was left.
        boxed = [p if p.shape[:2] == g.shape else self._host.prepare(p, g) for p, g in pairs]
        return self._host.submit(boxed, where)

    def stages(
        self, images: Sequence[Image], where: Sequence[Geometry]
    ) -> dict[str, Callable[[], object]]:
        """The parts of the way in order, to be timed; run one after the other they are the way."""
        pending = self._by_graph(images, where)
        if pending is None:
            return self._host.stages(images, where)
        pending.wait()
        pipeline, device = self._pipeline(images, where), self.network.device
        return {
            "upload": lambda: [torch.from_numpy(image).to(device) for image in images],
            **pipeline.stages(),
            "download": lambda: pipeline.output.boxes.cpu(),
        }

    def _by_graph(self, images: Sequence[Pixels], where: Sequence[Geometry]) -> Pending | None:
        """Detections under way; None once the network is eager."""
        network = self.network
        try:
            with network.lock, network.attempt():
                pipeline = self._pipeline(images, where)
                pending = pipeline.submit(images, where)
                network.check(pipeline, pending, images, where)
                return pending
        except EngineError:
            return None

    def _pipeline(self, images: Sequence[Pixels], where: Sequence[Geometry]) -> FramePipeline:
        capacity = self._batch * max(map(byte_count, images))
        return self.network.pipeline(self._batch, where[0].shape, self.suppression, capacity)
