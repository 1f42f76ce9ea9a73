"""A fused model made ready to run in PyTorch: device, precision, memory layout."""

import copy
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from yolov7.blocks import Conv, RepConv
from yolov7.engine.cpu import (
    Decoder,
    can_pack,
    give_back_freed_memory,
    keep_freed_memory,
    keep_to_quota,
    pack_convolutions,
)
from yolov7.engine.faults import require_living_device, warn
from yolov7.errors import first_line
from yolov7.kernels.runtime import FLOATS
from yolov7.model import YOLOv7, channels_last, parameter_count


class Network:
    """Decoded predictions of a model; what the other engines fall back to and are compared with.

    `yolov7.engine.choose.open_network` makes one from names.

    Args:
        model: Fused and changed in place.
        device: Where it runs.
        precision: Of the convolutions: "fp32", "fp16", "bf16", or "fp8" or "int8" (engine graph).
            Boxes are decoded in fp32 always.

    Attributes:
        device: Where it runs.
        dtype: Of the input and the convolutions, fp8 apart.
        precision: As it was given.
        engine: "eager", "compile" or "graph".
        names: Class names by number.
        stride: Of the coarsest level; sides of the input are multiples of it.
        imgsz: Side in pixels that the model is meant for.
        title: The variant and its size, in words.
        one_shape: Whether every input should have the same shape: each is compiled for itself.
    """

    engine = "eager"
    one_shape = False

    def __init__(self, model: YOLOv7, device: torch.device, precision: str) -> None:
        self.device, self.precision = device, precision
        higher = "fp16" if device.type == "cuda" else "fp32"  # of what 8 bits leave as it is
        self.dtype = FLOATS.get(precision, FLOATS[higher])
        self.names, self.stride, self.imgsz = model.names, model.stride, model.imgsz
        anchors = model.head.anchors.to(self.device, torch.float32)
        if device.type == "cuda":
            fold_on(model, device)
        model = model.fuse().requires_grad_(False).to(device, self.dtype)
        model.head.anchors = anchors  # 459 pixels would be 460 in bf16
        self.title = f"{model.variant.name}, {parameter_count(model) / 1e6:.1f} M parameters"
        channels_last(model)
        if device.type == "cpu":
            keep_freed_memory()
            keep_to_quota()
        self._model = model
        self._forward = self._made_ready(model)
        if device.type == "cpu":
            give_back_freed_memory()

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Decoded boxes [B, N, 5 + classes] in fp32 of images x [B, 3, H, W], RGB in 0..1."""
        x = x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        return self._forward(x)

    def _made_ready(self, model: YOLOv7) -> Callable[[Tensor], Tensor]:
        if self.device.type != "cpu":
            return model
        if self.precision == "int8":
            from yolov7.engine.int8 import Int8Forward  # loads torch.fx

            return self._decoded(model, Int8Forward(model))
        if can_pack():
            pack_convolutions(model)
        return self._decoded(model, model.lead_outputs)

    def _decoded(
        self, model: YOLOv7, outputs: Callable[[Tensor], list[Tensor]]
    ) -> Callable[[Tensor], Tensor]:
        decode = Decoder(model.head)
        return lambda x: decode(outputs(x))


@torch.no_grad()
def fold_on(model: YOLOv7, device: torch.device) -> None:
    """Bring a model to a GPU and fuse it there, by a kernel.

    Everything else is compared with what comes of this: so it has to agree with the CPU on a block
    of each kind first. Where it does not, or cannot be had, there is a warning, and the model stays
    where it is.
    """
    try:
        for block in _one_of_each(model):
            there, here = copy.deepcopy(block).to(device), copy.deepcopy(block).cpu()
            there.fuse()
            here.fuse()
            for a, b in zip(there.parameters(), here.parameters(), strict=True):
                if not torch.allclose(a.cpu(), b, rtol=1e-5, atol=1e-6):
                    raise ArithmeticError("other weights than on the CPU")
        model.to(device).fuse()
    except Exception as error:  # whatever a compiler or a driver throws
        require_living_device(device, first_line(error))
        warn(f"the model is folded on the CPU: {first_line(error)}")
        model.cpu()


def _one_of_each(model: YOLOv7) -> Iterator[Conv | RepConv]:
    kinds = set()
    for module in model.modules():
        if isinstance(module, (Conv, RepConv)):
            kind = type(module), module.conv and module.conv.kernel_size
            if kind not in kinds:
                kinds.add(kind)
                yield module
