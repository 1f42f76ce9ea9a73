"""What a fused model does, as a flat list of operations: traced from it, not written again."""

import operator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from yolov7.blocks import Conv, ReOrg, RepConv, activation_name
from yolov7.kernels.conv.layer import Activation
from yolov7.model import YOLOv7


@dataclass(frozen=True)
class Value:
    """A feature map of one image."""

    name: str
    channels: int
    height: int
    width: int

    @property
    def elements(self) -> int:
        """Pixels times channels."""
        return self.channels * self.height * self.width


OpKind = Literal["conv", "reorg", "cat", "maxpool", "spp_pool", "upsample", "add"]


@dataclass(frozen=True)
class Op:
    """One operation."""

    kind: OpKind
    output: Value
    inputs: tuple[Value, ...]
    conv: nn.Conv2d | None = None
    activation: Activation = "none"
    window: int = 0  # pixels of an spp_pool's side


class _Lead(nn.Module):
    """The model as far as the input of its detection head."""

    def __init__(self, model: YOLOv7) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        lead, _ = self.model.features(x)
        return tuple(conv(y) for conv, y in zip(self.model.lead_convs, lead, strict=True))


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        return isinstance(m, (Conv, RepConv, ReOrg))


def trace(model: YOLOv7, height: int, width: int) -> tuple[list[Op], tuple[Value, ...]]:
    """The operations of `model` up to its head, in order, and the head's inputs.

    Args:
        model: in fused form.
        height: of the image in pixels, a multiple of the stride.
        width: likewise.

    Raises:
        ValueError: the model is not fused, or a side is not a multiple of the stride.
    """
    if model.form != "fused":
        raise ValueError(f"only a fused model is lowered, this one has the {model.form} form")
    if height % model.stride or width % model.stride or min(height, width) < 1:
        raise ValueError(f"{height} x {width} pixels are no multiple of {model.stride}")
    root = _Lead(model)
    graph = fx.GraphModule(root, _Tracer().trace(root)).graph
    graph.eliminate_dead_code()  # the auxiliary maps
    values: dict[fx.Node, Value] = {}
    ops: list[Op] = []
    for node in graph.nodes:
        if node.op == "placeholder":
            values[node] = Value("image", 3, height, width)
        elif node.op == "output":
            return ops, tuple(values[n] for n in node.args[0])
        else:
            ops.append(_op(node, root, values))
            values[node] = ops[-1].output
    raise AssertionError("a graph ends in its output")


def _op(node: fx.Node, root: nn.Module, values: dict[fx.Node, Value]) -> Op:
    if node.op == "call_module":
        assert isinstance(node.target, str)
        return _module_op(node, root.get_submodule(node.target), values)
    if node.target is torch.cat:
        parts: Any = node.args[0]
        inputs = tuple(values[n] for n in parts)
        first = inputs[0]
        channels = sum(v.channels for v in inputs)
        return Op("cat", Value(node.name, channels, first.height, first.width), inputs)
    inputs = tuple(values[n] for n in node.all_input_nodes)
    x = inputs[0]
    if node.target is operator.add:
        return Op("add", Value(node.name, x.channels, x.height, x.width), inputs)
    if node.target is F.interpolate and node.kwargs["scale_factor"] == 2.0:
        return Op("upsample", Value(node.name, x.channels, 2 * x.height, 2 * x.width), inputs)
    if node.target is F.max_pool2d:
        pool = (node.args[1], node.kwargs["stride"], node.kwargs["padding"])
        if pool == (2, 2, 0):
            return Op("maxpool", Value(node.name, x.channels, x.height // 2, x.width // 2), inputs)
        for window in (5, 9, 13):
            if pool == (window, 1, window // 2):
                same = Value(node.name, x.channels, x.height, x.width)
                return Op("spp_pool", same, inputs, window=window)
    raise ValueError(f"no operation of the engine does {node.format_node()}")


def _module_op(node: fx.Node, module: nn.Module, values: dict[fx.Node, Value]) -> Op:
    x = values[node.all_input_nodes[0]]
    name = str(node.target).removeprefix("model.")
    if isinstance(module, ReOrg):
        return Op("reorg", Value(name, 4 * x.channels, x.height // 2, x.width // 2), (x,))
    assert isinstance(module, (Conv, RepConv))
    conv = module.conv
    assert conv is not None
    stride = conv.stride[0]
    out = Value(name, conv.out_channels, -(-x.height // stride), -(-x.width // stride))
    return Op("conv", out, (x,), conv, activation_name(module))
