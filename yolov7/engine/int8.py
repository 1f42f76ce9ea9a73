"""The network in int8 on a CPU, by oneDNN's quantised convolutions.

A map is uint8: each byte q stands for ``unit (q - zero)``. Maps that share a concat, a pool or an
upsample share both. What a calibration finds of a map is its largest magnitude
(`yolov7.engine.graph.calibrate`), which serves the engine graph's int8 as well. SiLU ends at -0.28,
so its maps get nearly twice the resolution of symmetric ones. Weights are int8, with a scale for
each output channel; sums are exact; bias, activation and rounding come before a map is stored.

oneDNN has no LeakyReLU for bytes. There the sum is rounded to a symmetric map, of which OpenCV
makes LeakyReLU: what lies below a tenth of the range, negative, is cut off.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import cv2
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolov7.blocks import ReOrg
from yolov7.engine.cpu import PackedConv
from yolov7.engine.graph.passes import fold
from yolov7.engine.graph.trace import Op, Value, trace
from yolov7.errors import UserError
from yolov7.kernels.conv.layer import Activation, quantise_weight
from yolov7.model import YOLOv7

SILU_LEAST = 0.2785  # of SiLU, below zero
SHARING = ("cat", "maxpool", "spp_pool", "upsample", "reorg")  # whose maps share a scale
SLOPE = 0.1  # of LeakyReLU
_PACKING = threading.Lock()


class Scale(NamedTuple):
    """What the bytes of a map stand for."""

    unit: float
    zero: int


IMAGE = Scale(1 / 255, 0)


class Int8Forward:
    """The raw outputs of the lead levels, as `YOLOv7.lead_outputs` gives them.

    Args:
        model: In fused form, fp32, with ranges for int8; its weights are used up. A map without a
            range stays in fp32, and so does what the head reads: eight bits there cost half a point
            of AP.

    Raises:
        UserError: No range is of a map of this model.
    """

    def __init__(self, model: YOLOv7) -> None:
        ops, self._outputs = trace(model, model.stride, model.stride)  # of no particular size
        scales = scales_of(ops, self._outputs, model.ranges["int8"])
        self._steps = []
        for op in ops:
            self._steps.append((op.inputs, op.output, _prepared(op, scales)))
            if op.conv is not None:  # four times what is kept of it
                op.conv.register_parameter("weight", None)
        last = {value: i for i, op in enumerate(ops) for value in op.inputs}
        self._done = [[v for v in set(op.inputs) if last[v] == i] for i, op in enumerate(ops)]
        for level, conv in enumerate(model.head.lead):
            assert isinstance(conv, nn.Conv2d)
            model.head.lead[level] = PackedConv(conv, None)
        self._head = model.head

    def __call__(self, x: Tensor) -> list[Tensor]:
        """Of images [B, 3, H, W], RGB in 0..1, channels last."""
        ((image,), *_), *_ = self._steps
        values = {image: (x * 255).add_(0.5).to(torch.uint8)}
        for (inputs, output, run), done in zip(self._steps, self._done, strict=True):
            values[output] = run(*(values[value] for value in inputs))
            for value in done:
                del values[value]
        return self._head.raw([values[value] for value in self._outputs])


def scales_of(
    ops: Sequence[Op], outputs: Sequence[Value], ranges: Mapping[str, float]
) -> dict[Value, Scale]:
    """The scale of every map that is kept in bytes: all that share one have ranges.

    Args:
        ops: Of the network up to its head.
        outputs: What the head reads, which stays in fp32.
        ranges: Largest magnitude of each map, by name.

    Raises:
        UserError: No range is of a map of this network.
    """
    if ranges.keys().isdisjoint(op.output.name for op in ops):
        raise UserError("the weights' ranges are those of another network: calibrate anew")
    precise = {value.name for value in outputs}
    ranges = {name: largest for name, largest in ranges.items() if name not in precise}
    (image,) = ops[0].inputs
    written = {value for task in fold(ops)[0] for value in task.outputs}  # which have ranges
    sharing = {image: [image]}  # a map -> those that have its scale
    least = {image: 0.0}  # a map -> where its activation ends; minus infinity where it does not
    for op in ops:
        bounded = op.kind in SHARING or op.activation == "silu"
        least[op.output] = -SILU_LEAST if bounded else -float("inf")
        sharing[op.output] = [op.output]
        for value in op.inputs if op.kind in SHARING else ():
            both = sharing[op.output]
            if sharing[value] is not both:
                both += sharing[value]
                sharing.update(dict.fromkeys(sharing[value], both))
    scales = {}
    for value, maps in sharing.items():
        names = [other.name for other in maps if other in written]
        if image in maps:
            scales[value] = IMAGE
        elif names and ranges.keys() >= set(names):
            largest = max(ranges[name] for name in names)
            below = min(largest, -min(least[other] for other in maps))
            unit = max((largest + below) / 255, 1e-12)
            scales[value] = Scale(unit, round(below / unit))
    return scales


def _prepared(op: Op, scales: Mapping[Value, Scale]) -> Callable[..., Tensor]:
    """What computes an operation."""
    source, target = scales.get(op.inputs[0]), scales.get(op.output)
    match op.kind:
        case "conv":
            assert op.conv is not None
            if source is not None:
                return Int8Conv(op.conv, op.activation, source, target)
            return partial(_rounded, _plain(op.conv, op.activation), target)
        case "add":
            return partial(_sum, [scales.get(value) for value in op.inputs], target)
        case "cat":
            return lambda *parts: torch.cat(parts, 1)
        case "reorg":
            return ReOrg()
        case "upsample":
            return partial(F.interpolate, scale_factor=2.0, mode="nearest")
        case "maxpool":
            return largest_of_4 if source else partial(F.max_pool2d, kernel_size=2)
        case "spp_pool":
            side = op.window
            plain = partial(F.max_pool2d, kernel_size=side, stride=1, padding=side // 2)
            return partial(largest_around, side=side) if source else plain
    raise ValueError(f"int8 has nothing for {op.kind} ({op.output.name})")


class Int8Conv(nn.Module):
    """A convolution of a map in bytes, with bias and activation.

    Args:
        conv: What it does, with a bias.
        activation: What follows.
        source: Of its input.
        target: Of its output; None: fp32.
    """

    def __init__(
        self, conv: nn.Conv2d, activation: Activation, source: Scale, target: Scale | None
    ) -> None:
        super().__init__()
        assert conv.bias is not None
        weight = conv.weight.detach().float()
        rows, self.scales = quantise_weight(weight.flatten(1), torch.int8)
        self.bias = conv.bias.detach().float()
        self.zeros = torch.zeros(len(rows), dtype=torch.int32)
        self.geometry = list(conv.stride), list(conv.padding), list(conv.dilation), conv.groups
        self.source, self.target, self.leaky = source, target, activation == "leaky_relu"
        unit, zero = target or Scale(1.0, 0)
        post = "swish" if activation == "silu" else "none"
        self.output = unit, zero, torch.uint8 if target else torch.float32, post, [None], ""
        self.weight, self.packed = rows.view(weight.shape), False

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] uint8, channels last."""
        if not self.packed:
            self._pack(list(x.shape))
        y: Tensor = torch.ops.onednn.qconv2d_pointwise.default(
            x,
            *self.source,
            self.weight,
            self.scales,
            self.zeros,
            self.bias,
            *self.geometry,
            *self.output,
        )
        if not self.leaky:
            return y
        return leaky_bytes(y, self.target.zero) if self.target else F.leaky_relu_(y, SLOPE)

    def _pack(self, shape: list[int]) -> None:
        """Bring the weight into oneDNN's order, once, whichever thread is first."""
        with _PACKING:
            if not self.packed:
                self.weight = torch.ops.onednn.qconv_prepack(
                    self.weight, self.scales, *self.source, *self.geometry, shape
                )
                self.packed = True


def _plain(conv: nn.Conv2d, activation: Activation) -> PackedConv:
    acts = {"silu": nn.SiLU(), "leaky_relu": nn.LeakyReLU(SLOPE), "none": None}
    return PackedConv(conv, acts[activation])


def _rounded(run: Callable[[Tensor], Tensor], target: Scale | None, x: Tensor) -> Tensor:
    """Numbers as bytes, rounded to even, saturated; without a scale as they are."""
    y = run(x)
    if target is None:
        return y
    return y.div_(target.unit).round_().add_(target.zero).clamp_(0, 255).to(torch.uint8)


def _sum(scales: Sequence[Scale | None], target: Scale | None, *maps: Tensor) -> Tensor:
    numbers = [
        (x.float() - scale.zero).mul_(scale.unit) if scale else x
        for x, scale in zip(maps, scales, strict=True)
    ]
    return _rounded(lambda first: sum(numbers[1:], first), target, numbers[0])


def largest_of_4(x: Tensor) -> Tensor:
    """Max-pool 2x2 of stride 2 of bytes, for which PyTorch has none."""
    height, width = (side // 2 * 2 for side in x.shape[2:])
    rows = torch.maximum(x[:, :, 0:height:2], x[:, :, 1:height:2])
    return torch.maximum(rows[..., 0:width:2], rows[..., 1:width:2])


def largest_around(x: Tensor, side: int) -> Tensor:
    """Max-pool of 5, 9 or 13 pixels, stride 1, of bytes, of the same size: 5 again and again."""
    if side > 5:
        x = largest_around(x, side - 4)
    x = F.pad(x, (2, 2, 2, 2))  # with the least there is
    for dim in (2, 3):
        length = x.shape[dim] - 4
        pairs = torch.maximum(x.narrow(dim, 0, length + 2), x.narrow(dim, 1, length + 2))
        fours = torch.maximum(pairs.narrow(dim, 0, length), pairs.narrow(dim, 2, length))
        x = torch.maximum(fours, x.narrow(dim, 4, length))
    return x


def leaky_bytes(x: Tensor, zero: int) -> Tensor:
    """LeakyReLU of bytes [B, C, H, W], channels last: the larger of x and a tenth; halves go up.

    Half the time of a table of 256 bytes.
    """
    pixels = x.permute(0, 2, 3, 1)
    rows = pixels.reshape(-1, pixels.shape[2] * pixels.shape[3]).numpy()
    tenth = cv2.convertScaleAbs(rows, alpha=SLOPE, beta=(1 - SLOPE) * zero + 1e-3)
    found = cv2.max(rows, tenth, dst=tenth)
    return torch.from_numpy(found).view(pixels.shape).permute(0, 3, 1, 2)


def sums_are_exact() -> bool:
    """Whether this machine convolves bytes, and without saturating on the way.

    Without VNNI or AMX oneDNN adds products in 16 bits, and says nothing.
    """
    ones = nn.Conv2d(64, 16, 1).requires_grad_(False)
    for parameter, value in ((ones.weight, 1.0), (ones.bias, 0.0)):
        assert parameter is not None
        parameter.fill_(value)
    x = torch.full((1, 64, 8, 8), 255, dtype=torch.uint8)
    try:
        y = Int8Conv(ones, "none", Scale(1.0, 0), None)(x.to(memory_format=torch.channels_last))
    except (AttributeError, RuntimeError):  # another build of PyTorch, another processor
        return False
    return bool((y == 64 * 255).all())
