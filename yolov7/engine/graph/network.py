"""The engine graph as a network: its plans, its pipelines, and what happens where it fails.

Nothing of this has to succeed: see `GraphNetwork`.
"""

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from yolov7.engine.eager import Network
from yolov7.engine.faults import first_line, require_living_device
from yolov7.engine.frames import (
    HostFrames,
    Pending,
    Pixels,
    Suppression,
    same_input,
)
from yolov7.engine.graph.captured import STAGES, FramePipeline, byte_count
from yolov7.engine.graph.planned import PlannedNetwork
from yolov7.errors import UserError
from yolov7.letterbox import Geometry, Image
from yolov7.model import YOLOv7

PLANS = 4  # shapes that a network is ready for

# Relative RMS between what a plan decodes and the eager model, above which the plan is wrong: eight
# times what rounding makes of the demo model's objectness, its most sensitive part (fp16 1.3e-3,
# bf16 1.2e-2). PyTorch's convolutions in fp32 are TF32 on a GPU, as coarse as fp16; fp8 has a
# mantissa of 3 bits and costs up to 0.1.
TOLERANCE = {"fp32": 1e-2, "fp16": 1e-2, "bf16": 1e-1, "fp8": 3e-1}
PARTS = {"boxes": slice(4), "objectness": slice(4, 5), "classes": slice(5, None)}
SAME_BOXES = 1e-2  # pixels, or score: between suppression on the device and on the CPU


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
        """Decoded boxes [B, N, 5 + classes] in fp32 of images x [B, 3, H, W], RGB in 0..1."""
        try:
            with self.lock, torch.no_grad(), self.attempt():
                plan = self._plan(x.shape[0], x.shape[2], x.shape[3])
                return self._run(plan, x)
        except EngineError:
            return super().__call__(x)

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
        pipeline = plan.pipelines.get(suppression)
        if pipeline is None or pipeline.capacity < capacity:
            self._drain()
            with torch.inference_mode(False):  # whoever makes the buffers, others may write them
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
        if pipeline.checked or not self.guarded:
            return
        network, found = pipeline.network, pending.wait()
        if not same_input(network.images, frames, where):
            self._fail("the letterbox of the first batch is another than OpenCV's")
        decoded = network.decode()[0]
        self._compare(decoded, network.images)
        expected = pipeline.expected(decoded)
        n = len(found.boxes)
        if not (
            torch.equal(found.counts, expected.counts[:n])
            and torch.allclose(found.boxes, expected.boxes[:n], rtol=0, atol=SAME_BOXES)
        ):
            self._fail("the boxes of the first batch are not those of the kernels' references")
        pipeline.checked = True

    def _made_ready(self, model: YOLOv7) -> Callable[[Tensor], Tensor]:
        return model  # as it is: plans are made of its convolutions

    def _plan(self, *shape: int) -> "_Plan":
        plan = self._plans.pop(shape, None)  # type: ignore[arg-type]  # batch, height, width
        if plan is None:
            self._drain()  # what is under way may use memory that is given to the new plan
            if len(self._plans) == PLANS:
                del self._plans[next(iter(self._plans))]
            ranges = self._model.ranges if self.precision == "fp8" else None
            with torch.inference_mode(False), torch.no_grad(), self._on_stream():
                network = PlannedNetwork(
                    self._model, *shape, dtype=self.dtype, device=self.device, ranges=ranges
                )
            plan = _Plan(network)
        self._plans[shape] = plan  # type: ignore[index]  # likewise
        return plan

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
        for what, part in PARTS.items():
            error = _relative_rms(decoded[..., part], expected[..., part])
            if not error <= TOLERANCE[self.precision]:  # NaN, too
                self._fail(f"its {what} are off PyTorch's by {error:.1e} (relative RMS)")

    def _fail(self, reason: str) -> None:
        require_living_device(self.device, reason)
        if self.required:
            raise UserError(f"engine graph: {reason}: use --engine eager") from None
        self.engine, self._plans = "eager", {}
        warnings.warn(f"engine graph is left for eager: {reason}", stacklevel=6)
        raise EngineError from None

    def _on_stream(self) -> AbstractContextManager[object]:
        """The stream on which all plans work, behind what the caller has queued."""
        if self._stream is None:
            return nullcontext()
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        return torch.cuda.stream(self._stream)

    def _drain(self) -> None:
        if self._stream is not None:
            torch.cuda.synchronize(self.device)


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

    in_flight = STAGES - 1

    def __init__(self, network: GraphNetwork, suppression: Suppression, batch: int) -> None:
        self.network, self.suppression, self._batch = network, suppression, batch
        self._host = HostFrames(network, suppression, batch)

    def prepare(self, pixels: Pixels, geometry: Geometry) -> Pixels:  # noqa: ARG002  # in the graph
        """Nothing: the letterbox is part of the graph."""
        return pixels

    def submit(self, prepared: Sequence[Pixels], where: Sequence[Geometry]) -> Pending:
        """Start detecting."""
        network = self.network
        try:
            with network.lock, network.attempt():
                pipeline = self._pipeline(prepared, where)
                pending = pipeline.submit(prepared, where)
                network.check(pipeline, pending, prepared, where)
            return pending
        except EngineError:
            pairs = zip(prepared, where, strict=True)
            return self._host.submit([self._host.prepare(p, g) for p, g in pairs], where)

    def stages(
        self, images: Sequence[Image], where: Sequence[Geometry]
    ) -> dict[str, Callable[[], object]]:
        """Upload, letterbox, network, decode, nms, download."""
        try:
            with self.network.lock, self.network.attempt():
                pipeline = self._pipeline(images, where)
                pipeline.submit(images, where).wait()
        except EngineError:
            return self._host.stages(images, where)
        device = self.network.device
        return {
            "upload": lambda: [torch.from_numpy(image).to(device) for image in images],
            **pipeline.stages(),
            "download": lambda: pipeline.output.boxes.cpu(),
        }

    def _pipeline(self, images: Sequence[Pixels], where: Sequence[Geometry]) -> FramePipeline:
        capacity = self._batch * max(map(byte_count, images))
        return self.network.pipeline(self._batch, where[0].shape, self.suppression, capacity)


def _relative_rms(a: Tensor, b: Tensor) -> float:
    return float(
        (a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt()
    )
