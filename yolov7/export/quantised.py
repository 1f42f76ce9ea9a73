"""The network with the rounding of int8 in it, as a graph of fp32 operators.

While exporting, it is written as ONNX's QuantizeLinear and DequantizeLinear, which runtimes pull
into the operators between them. Scales are those of `yolov7.engine.int8`. Where that rounds once,
behind the activation, there is one rounding more here, between convolution and activation:
runtimes convolve bytes only where a convolution's sum is rounded at once.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.onnx.ops import symbolic

from yolov7.blocks import ReOrg
from yolov7.engine.graph.trace import Op, trace
from yolov7.engine.int8 import Scale, scales_of
from yolov7.kernels.conv.layer import activate, quantise_weight
from yolov7.model import YOLOv7

SILU_FROM = 5.0  # what lies further below zero is taken for this


class Quantised(nn.Module):
    """A fused model whose maps and weights are rounded to bytes.

    Args:
        model: In fused form, fp32, with ranges for int8. What its head reads stays in fp32.

    Raises:
        UserError: No range is of a map of this model.
    """

    def __init__(self, model: YOLOv7) -> None:
        super().__init__()
        self._ops, self._outputs = trace(model, model.stride, model.stride)  # of no particular size
        self._scales = scales_of(self._ops, self._outputs, model.ranges["int8"])
        (self._image,) = self._ops[0].inputs
        self.model = model
        for op in self._ops:
            if op.conv is not None and op.inputs[0] in self._scales:
                rows, scale = quantise_weight(op.conv.weight.flatten(1), torch.int8)
                op.conv.register_buffer("bytes", rows.view_as(op.conv.weight))
                op.conv.register_buffer("scale", scale)

    def forward(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W], RGB in 0..1, to predictions [B, N, 5 + classes]."""
        values = {self._image: rounded(images, self._scales.get(self._image))}
        for op in self._ops:
            values[op.output] = self._run(op, [values[value] for value in op.inputs])
        head = self.model.head
        return head.decode(head.raw([values[value] for value in self._outputs]))

    def _run(self, op: Op, maps: list[Tensor]) -> Tensor:
        target = self._scales.get(op.output)
        if op.conv is not None:
            return self._convolved(op, op.conv, maps[0], target)
        (x, *_) = maps
        match op.kind:
            case "add":
                y = sum(maps[1:], x)
            case "cat":
                y = torch.cat(maps, 1)
            case "upsample":
                y = F.interpolate(x, scale_factor=2.0, mode="nearest")
            case "maxpool":
                y = F.max_pool2d(x, 2)
            case "spp_pool":
                y = F.max_pool2d(x, op.window, 1, op.window // 2)
            case _:
                y = ReOrg()(x)
        return rounded(y, target)

    def _convolved(self, op: Op, conv: nn.Conv2d, x: Tensor, target: Scale | None) -> Tensor:
        weight = conv.weight
        if op.inputs[0] in self._scales:
            weight = numbers(conv.get_buffer("bytes"), conv.get_buffer("scale"))
        y = F.conv2d(x, weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups)
        if op.activation != "none":
            y = activate(rounded(y, before(op, target)), op.activation)
        return rounded(y, target)


def before(op: Op, target: Scale | None) -> Scale | None:
    """The scale of a sum, of whose activation `target` is the scale."""
    if target is None or op.activation == "leaky_relu":
        return target
    largest = (255 - target.zero) * target.unit
    for _ in range(8):  # SiLU backwards: x = y (1 + e^-x)
        largest = (255 - target.zero) * target.unit * (1 + math.exp(-largest))
    unit = (largest + SILU_FROM) / 255
    return Scale(unit, round(SILU_FROM / unit))


def rounded(x: Tensor, scale: Scale | None) -> Tensor:
    """Numbers that bytes of this scale can stand for; without one, as they are."""
    if scale is None or not torch.compiler.is_exporting():
        return x if scale is None else torch.fake_quantize_per_tensor_affine(x, *scale, 0, 255)
    step = torch.tensor(scale.unit), torch.tensor(scale.zero, dtype=torch.uint8)
    steps = symbolic("QuantizeLinear", (x, *step), dtype=torch.uint8, shape=x.shape)
    return symbolic("DequantizeLinear", (steps, *step), dtype=x.dtype, shape=x.shape)


def numbers(rows: Tensor, scale: Tensor) -> Tensor:
    """What int8 [out, ...] stands for, with a scale for each row."""
    if not torch.compiler.is_exporting():
        return rows * scale.view(-1, *[1] * (rows.ndim - 1))
    return symbolic(
        "DequantizeLinear", (rows, scale), {"axis": 0}, dtype=scale.dtype, shape=rows.shape
    )
