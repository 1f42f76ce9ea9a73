"""A plan made ready to run: buffers allocated, weights packed, every launch prepared.

On CUDA, and in Triton's interpreter, a step is a launch of a kernel; on a CPU it is the kernels'
plain PyTorch references over the same buffers, slices and groups.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor, nn

from yolov7.engine.graph.plan import Plan, make_plan
from yolov7.engine.graph.steps import Slice, Step, Task
from yolov7.head import Detect
from yolov7.kernels.concat import concat
from yolov7.kernels.conv import (
    LARGEST,
    ConvCall,
    ConvLaunch,
    ConvLayer,
    Launch,
    Stem,
    StemCall,
    StemLaunch,
    Workspace,
    pack_weight,
    quantise_weight,
    space_to_depth_weight,
)
from yolov7.kernels.conv.model import copy_timed, corners
from yolov7.kernels.decode import decode
from yolov7.kernels.pool import max_pool, spp, upsample
from yolov7.model import YOLOv7


class PlannedNetwork:
    """The network of a fused model for one batch, size and precision.

    Args:
        model: in fused form, on `device`.
        batch: images.
        height: of the input in pixels, a multiple of the model's stride.
        width: likewise.
        dtype: of feature maps and weights: fp32, fp16 or bf16.
        device: where it runs.
        ranges: largest magnitude of each map by name, from `calibrate`; maps that it names and
            that only convolutions touch are of `narrow`, with one scale per buffer.
        narrow: fp8 e4m3 or int8.

    Attributes:
        images: [batch, 3, height, width] the input, to be written before `run`.
        features: the head's inputs after `run`, [batch, C, H, W] views of the buffers.
        plan: what is run.
        convolutions: the launches that are some, in order.
    """

    def __init__(
        self,
        model: YOLOv7,
        batch: int,
        height: int,
        width: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        ranges: Mapping[str, float] | None = None,
        narrow: torch.dtype = torch.float8_e4m3fn,
    ) -> None:
        ranges = ranges or {}
        self.plan = make_plan(model, batch, height, width, dtype.itemsize, ranges.keys())
        self._narrow = narrow
        self._scales = _buffer_scales(self.plan, ranges, LARGEST[narrow]) if ranges else {}
        device = with_index(device)
        self.dtype, self.device = dtype, device
        self._arena = torch.empty(self.plan.peak_bytes, dtype=torch.uint8, device=device)
        self._workspace = Workspace()
        self.images = torch.empty(
            (batch, 3, height, width),
            dtype=dtype,
            device=device,
            memory_format=torch.channels_last,
        )
        self.convolutions: list[Launch] = []
        self._launches: list[tuple[Step, list[Callable[[], object]]]] = []
        for step in self.plan.steps:
            if step.kind == "head":
                self.features = [self._pixels(where) for where in step.tasks[0].reads]
                self._decode = self._prepare_head(step.tasks[0], model.head)
            else:
                self._launches.append((step, self._prepare(step)))
        if device.type == "cuda":
            self._compile()

    def _compile(self) -> None:
        """Run every launch once, many at a time: kernels that are new here compile in parallel.

        Rarely, and for no reason that was found, what compiles alone does not beside others; what
        failed runs again, and then says why.
        """

        def runs(launches: Sequence[Callable[[], object]]) -> bool:
            try:
                self._run_step(launches)
            except Exception:  # whatever a compiler or a driver throws
                return False
            return True

        steps = [launches for _, launches in self._launches]
        with ThreadPoolExecutor() as pool:
            done = list(pool.map(runs, steps))
        for launches in itertools.compress(steps, (not ok for ok in done)):
            self._run_step(launches)
        torch.cuda.synchronize(self.device)

    def _on_device(self) -> AbstractContextManager[object]:
        """Triton launches on the current device, whatever the tensors' is."""
        cuda = self.device.type == "cuda"
        return torch.cuda.device(self.device) if cuda else nullcontext()

    def _run_step(self, launches: Sequence[Callable[[], object]]) -> None:
        with self._on_device():
            _run_all(launches)

    def poison(self) -> None:
        """Fill every buffer with NaN: what is read before it is written shows in the result."""
        self._arena.fill_(0xFF)  # of fp32, fp16, bf16 and fp8 e4m3 alike; int8 has none

    def launches(self) -> Iterator[tuple[Step, Callable[[], None]]]:
        """The steps of the plan before the head, each with what runs it, in order."""
        for step, launches in self._launches:
            yield step, partial(self._run_step, launches)

    def run(self, observe: Callable[[str, Tensor], None] | None = None) -> None:
        """From `images` to `features`.

        Args:
            observe: called with the name and the pixels [batch, C, H, W] of every map, written.
        """
        with self._on_device():
            for step, launches in self._launches:
                _run_all(launches)
                if observe is not None:
                    for name, where in _written(step):
                        observe(name, self._pixels(where))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Decoded boxes [B, N, 5 + classes] in fp32 of x [B, 3, H, W], RGB in 0..1."""
        self.images.copy_(x)
        self.run()
        return self.decode()[0]

    def decode(self, conf: float | None = None) -> tuple[Tensor, Tensor]:
        """Boxes of `features`: dense, or above a confidence; see `yolov7.kernels.decode`."""
        rows, counts = self._decode(conf=conf)
        return rows, counts

    def _map(self, where: Slice) -> Tensor:
        """The pitched map [rows, channels] of a slice, a view of the arena."""
        buffer = where.buffer
        dtype = self._narrow if buffer.index in self._scales else self.dtype
        elements = buffer.layout.rows * buffer.channels
        data = self._arena[buffer.offset : buffer.offset + elements * dtype.itemsize]
        matrix = data.view(dtype).view(buffer.layout.rows, buffer.channels)
        return matrix[:, where.start : where.start + where.channels]

    def _scale(self, where: Slice) -> float:
        """What one unit of the slice's elements stands for."""
        return self._scales.get(where.buffer.index, 1.0)

    def _pixels(self, where: Slice) -> Tensor:
        return where.buffer.layout.image_view(self._map(where)).permute(0, 3, 1, 2)

    def _weights(self, convs: Sequence[nn.Conv2d]) -> tuple[Tensor, Tensor]:
        """Packed weights of neighbouring convolutions, and their biases in fp32."""
        weight = pack_weight(*(conv.weight.detach() for conv in convs))
        bias = torch.cat([conv.bias.detach().float() for conv in convs if conv.bias is not None])
        return weight.to(self.device, self.dtype), bias.to(self.device)

    def _prepare(self, step: Step) -> list[Callable[[], object]]:
        (task, *_) = step.tasks
        match step.kind:
            case "conv":
                return [self._prepare_convs(ConvLaunch([self._call(t) for t in step.tasks]))]
            case "stem":
                return [self._prepare_convs(StemLaunch(self._stem(task)))]
            case "spp":
                (source,), targets = task.reads, [self._map(w) for w in task.writes]
                x, layout = self._map(source), source.buffer.layout
                return [partial(spp, x, layout, targets, task.windows)]
            case "copy":
                return [partial(concat, [self._map(task.reads[0])], self._map(task.writes[0]))]
            case "maxpool" | "upsample" as kind:
                move = max_pool if kind == "maxpool" else upsample
                (source,), (target,) = task.reads, task.writes
                maps = self._map(source), source.buffer.layout, self._map(target)
                return [partial(move, *maps, target.buffer.layout)]
            case kind:
                raise ValueError(f"the engine has no kernel for the step {kind} ({task.name})")

    def _prepare_convs(self, launch: Launch) -> Callable[[], object]:
        self.convolutions.append(launch)
        return launch.prepare(workspace=self._workspace)

    def _stem(self, task: Task) -> StemCall:
        weight, bias = self._weights(task.convs)
        kernel, stride = task.kernel, task.stride
        if task.reorg:  # a 3x3 over 2x2 cells is a 6x6 of stride 2 over pixels
            weight = pack_weight(space_to_depth_weight(task.convs[0].weight.detach()))
            weight, kernel, stride = weight.to(self.device, self.dtype), 6, 2
        stem = Stem(
            task.writes[0].buffer.layout,
            kernel,
            stride,
            task.activation,
            exact=self.dtype == torch.float32,
            out_scale=self._scale(task.writes[0]),
        )
        return StemCall(stem, self.images, weight, bias, self._map(task.writes[0]))

    def _prepare_head(self, task: Task, head: Detect) -> Callable[..., tuple[Tensor, Tensor]]:
        weights, biases = zip(*(self._weights([conv]) for conv in task.convs), strict=True)
        return partial(
            decode,
            [self._map(where) for where in task.reads],
            weights,
            biases,
            head.anchors.to(self.device, torch.float32),
            [where.buffer.layout for where in task.reads],
            head.strides,
            exact=self.dtype == torch.float32,
        )

    def _call(self, task: Task) -> ConvCall:
        (source, *residual), (target,) = task.reads, task.writes
        weight, bias = self._weights(task.convs)
        scale = None
        if source.buffer.index in self._scales:
            weight, scale = quantise_weight(weight, self._narrow)
            scale = scale * self._scale(source)
        layer = ConvLayer(
            source.buffer.layout,
            target.buffer.layout,
            source.channels,
            target.channels,
            task.kernel,
            task.stride,
            task.activation,
            pool=task.pool,
            upsample=task.upsample,
            exact=self.dtype == torch.float32,
            out_scale=self._scale(target),
            residual_scale=self._scale(residual[0]) if residual else 1.0,
        )
        added = self._map(residual[0]) if residual else None
        out = self._map(target)
        return ConvCall(layer, self._map(source), weight, bias, out, scale, added)


def described(
    model: YOLOv7, batch: int, height: int, width: int, dtype: torch.dtype
) -> list[Launch]:
    """What a plan launches, on the meta device: to be compiled, tuned or checked.

    Args:
        model: in fused form, on the meta device.
        batch: images.
        height: of the input in pixels, a multiple of the model's stride.
        width: likewise.
        dtype: fp32, fp16 or bf16 maps, or fp8 e4m3 or int8 where the plan has them.
    """
    narrow = dtype if dtype in LARGEST else torch.float8_e4m3fn

    def planned(names: Iterable[str]) -> PlannedNetwork:
        ranges = dict.fromkeys(names, LARGEST[narrow])  # every scale is 1
        higher = torch.float16 if dtype in LARGEST else dtype
        return PlannedNetwork(
            model,
            batch,
            height,
            width,
            dtype=higher,
            device=torch.device("meta"),
            ranges=ranges,
            narrow=narrow,
        )

    network = planned(())
    if dtype in LARGEST:
        network = planned(name for step in network.plan.steps for name, _ in _written(step))
    return network.convolutions


def expected_seconds(plan: Plan, launches: Iterable[Launch]) -> list[tuple[float, ...]]:
    """What each step of a plan takes by the cost model, in each corner of it.

    Args:
        plan: of the launches.
        launches: the convolutions among its steps, in order, as `described` gives them.
    """
    convolutions = iter(launches)
    at = corners(torch.device("meta"))
    seconds = []
    for step in plan.steps:
        if step.kind in ("conv", "stem"):
            seconds.append(next(convolutions).expected())
        else:
            moved = plan.step_bytes(step) + plan.step_weight_bytes(step)
            seconds.append(tuple(map(copy_timed(moved), at)))
    return seconds


def with_index(device: torch.device) -> torch.device:
    """The device with its index: ``cuda`` is the current one, which is another in a new thread."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _run_all(launches: Sequence[Callable[[], object]]) -> None:
    for launch in launches:
        launch()


def _written(step: Step) -> Iterator[tuple[str, Slice]]:
    """The maps that a step writes, each with its slice; products write several side by side."""
    for task in step.tasks:
        if len(task.writes) == len(task.outputs):
            yield from ((v.name, w) for v, w in zip(task.outputs, task.writes, strict=True))
            continue
        start = task.writes[0].start
        for value in task.outputs:
            yield value.name, Slice(task.writes[0].buffer, start, value.channels)
            start += value.channels


def _buffer_scales(plan: Plan, ranges: Mapping[str, float], largest: float) -> dict[int, float]:
    """Buffer -> scale, of the buffers of 8 bits: the largest range in one becomes `largest`."""
    scales: dict[int, float] = {}
    for step in plan.steps:
        for name, where in _written(step):
            if where.buffer.itemsize == 1:
                scale = max(ranges[name] / largest, torch.finfo(torch.float32).tiny)
                scales[where.buffer.index] = max(scale, scales.get(where.buffer.index, 0.0))
    return scales
