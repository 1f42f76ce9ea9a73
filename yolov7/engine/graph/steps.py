"""What a plan is made of: buffers, slices of them, tasks that read and write slices, steps."""

from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from yolov7.engine.graph.trace import Value
from yolov7.kernels.conv.layer import Activation
from yolov7.kernels.layout import PitchedLayout


@dataclass
class Buffer:
    """A feature map in the arena."""

    index: int
    channels: int
    height: int
    width: int
    layout: PitchedLayout
    itemsize: int = 2  # bytes of an element; 1: fp8
    bytes: int = 0
    offset: int = 0  # in the arena, in bytes
    first: int = 0  # step that writes it first
    last: int = 0  # step that reads it last


@dataclass(frozen=True)
class Slice:
    """Channels `start` to `start + channels` of a buffer."""

    buffer: Buffer
    start: int
    channels: int

    @property
    def bytes(self) -> int:
        """Of the pixels of all images, the border apart."""
        b = self.buffer
        return b.layout.n * b.height * b.width * self.channels * b.itemsize

    def describe(self) -> str:
        """`b3[64:128]`."""
        return f"b{self.buffer.index}[{self.start}:{self.start + self.channels}]"


TaskKind = Literal["stem", "conv", "spp", "maxpool", "upsample", "add", "copy", "head"]


@dataclass
class Task:
    """One operation of a step; its convolutions write neighbouring channels of `writes[0]`."""

    kind: TaskKind
    name: str
    inputs: list[Value]
    outputs: list[Value]
    convs: list[nn.Conv2d] = field(default_factory=list)
    activation: Activation = "none"
    pool: bool = False
    upsample: bool = False
    reorg: bool = False
    residual: Value | None = None
    windows: list[int] = field(default_factory=list)  # pixels of the pools' sides, of an spp
    reads: list[Slice] = field(default_factory=list)
    writes: list[Slice] = field(default_factory=list)

    @property
    def needs(self) -> list[Value]:
        """All values that it reads."""
        return [*self.inputs, *([self.residual] if self.residual else [])]

    @property
    def kernel(self) -> int:
        """Side of the convolution's kernel."""
        return self.convs[0].kernel_size[0]

    @property
    def stride(self) -> int:
        """Of the convolution."""
        return self.convs[0].stride[0]

    @property
    def groups_with(self) -> tuple[object, ...]:
        """What convolutions of one launch must agree in: a pooled branch goes with a strided one.

        What keeps the size of its map reads through descriptors, with one kernel for all.
        """
        reads = "halved" if self.pool or self.stride == 2 else self.kernel
        types = tuple(where.buffer.itemsize for where in self.reads)  # of the residual as well
        return self.kind, reads, types, self.upsample, self.activation

    def describe(self) -> str:
        """`64x80x80 -> 128 3x3/1`: the input of one image, then what is made of it."""
        v = self.inputs[0]
        if self.kind == "head":
            return " ".join(f"{v.channels}x{v.height}x{v.width}" for v in self.inputs)
        shape = f"{v.channels}x{v.height}x{v.width}"
        if not self.convs:
            return shape
        marks = {"pool": self.pool, "upsample": self.upsample, "sum": self.residual is not None}
        options = "".join(f" +{name}" for name, on in marks.items() if on)
        out = sum(conv.out_channels for conv in self.convs)
        return f"{shape} -> {out} {self.kernel}x{self.kernel}/{self.stride}{options}"

    @property
    def flops(self) -> int:
        """Of one image, two per multiply-add."""
        if self.kind == "head":  # a convolution for each input
            pairs = zip(self.inputs, self.convs, strict=True)
            return sum(2 * v.height * v.width * conv.weight.numel() for v, conv in pairs)
        if not self.convs:
            return 0
        pixels = self.outputs[0].height * self.outputs[0].width // (4 if self.upsample else 1)
        return 2 * pixels * sum(conv.weight.numel() for conv in self.convs)


@dataclass
class Step:
    """One launch: tasks of one kind."""

    tasks: list[Task]

    @property
    def kind(self) -> TaskKind:
        """That of its tasks."""
        return self.tasks[0].kind
