"""What a model is made of: every layer with shapes, parameters and FLOPs."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from yolov7.blocks import activation_name
from yolov7.model import YOLOv7, parameter_count


@dataclass(frozen=True)
class Layer:
    """One layer in execution order, for one image."""

    name: str  # dotted module name
    kind: str  # class of the layer, such as "Conv2d"
    activation: str  # "silu", "leaky_relu" or "none"
    in_channels: int
    out_channels: int
    kernel: int
    stride: int
    height: int  # of the input, in pixels
    width: int
    out_height: int
    out_width: int
    parameters: int
    flops: int  # two per multiply-add

    @property
    def stage(self) -> str:
        """The part of the network that the layer belongs to, such as "backbone.2"."""
        first, *rest = self.name.split(".")
        return f"{first}.{rest[0]}" if rest and rest[0].isdigit() and first != "stem" else first


@contextmanager
def _convolution_hooks(model: YOLOv7, calls: list[tuple[str, Tensor, Tensor]]) -> Iterator[None]:
    def record(name: str) -> object:
        return lambda _, inputs, output: calls.append((name, inputs[0], output))

    handles = [
        m.register_forward_hook(record(n))  # type: ignore[arg-type]  # a lambda
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def conv_layers(model: YOLOv7, height: int, width: int) -> list[Layer]:
    """The convolutions of `model` in execution order, for an image of height x width pixels.

    The form is the model's own; a fused model gives the layers that inference runs. Nothing is
    computed: the pass runs on the meta device. FLOPs are those of the convolutions, two per
    multiply-add, biases and activations left out.
    """
    with torch.device("meta"):
        form = "deploy" if model.form == "fused" else model.form
        model, fused = YOLOv7(model.variant, model.head.num_classes, form), model.form == "fused"
        model = model.fuse() if fused else model.eval()
    calls: list[tuple[str, Tensor, Tensor]] = []
    with _convolution_hooks(model, calls), torch.no_grad():
        model(torch.empty(1, 3, height, width, device="meta"), raw=model.form == "training")
    modules = dict(model.named_modules())
    rows = []
    for name, x, y in calls:
        conv = modules[name]
        assert isinstance(conv, nn.Conv2d)
        _, in_channels, in_height, in_width = x.shape
        _, out_channels, out_height, out_width = y.shape
        macs = conv.weight.numel() * out_height * out_width
        rows.append(
            Layer(
                name=name,
                kind=type(conv).__name__,
                activation=activation_name(modules[name.rpartition(".")[0]]),
                in_channels=in_channels,
                out_channels=out_channels,
                kernel=conv.kernel_size[0],
                stride=conv.stride[0],
                height=in_height,
                width=in_width,
                out_height=out_height,
                out_width=out_width,
                parameters=parameter_count(conv),
                flops=2 * macs,
            )
        )
    return rows
