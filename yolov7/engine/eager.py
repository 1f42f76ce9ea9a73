"""A fused model made ready to run: device, precision, memory layout, engine."""

import os
import shutil
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from yolov7.cache import cache_folder
from yolov7.checkpoint import load_model
from yolov7.device import resolve_device
from yolov7.engine.cpu import Decoder, can_pack, keep_freed_memory, pack_convolutions
from yolov7.engine.exported import SUFFIXES, ExportedNetwork
from yolov7.errors import UserError
from yolov7.model import YOLOv7

if TYPE_CHECKING:
    from yolov7.engine.graph.planned import PlannedNetwork

T = TypeVar("T")

COMPILED = "TORCHINDUCTOR_CACHE_DIR"
PLANS = 4  # input shapes that the graph engine is ready for
OLDEST = (8, 0)  # compute capability that the kernels are made for
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


def resolve_precision(name: str, device: torch.device, engine: str = "eager") -> torch.dtype:
    """The dtype of a precision, of "fp8" that of what it leaves unquantised.

    "auto" is fp16 on CUDA and fp32 on a CPU.

    Raises:
        UserError: An unknown precision, or one that the device or the engine has not got.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "fp8":
        if engine != "graph":
            raise UserError(f"precision fp8 needs engine graph, not {engine}")
        return torch.float16 if device.type == "cuda" else torch.float32
    if name not in _DTYPES:
        raise UserError(f"precision {name}: give auto, {', '.join(_DTYPES)}, fp8")
    if name == "fp16" and device.type == "cpu" and engine != "graph":
        raise UserError("precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    return _DTYPES[name]


class Network:
    """Decoded predictions of a model, as fast as the device does it.

    Args:
        model: Fused and changed in place.
        device: "auto", "cpu", "cuda", "cuda:N".
        precision: "auto", "fp32", "fp16" (on a CPU only with the engine graph), "bf16", or "fp8"
            (engine graph, weights that `yolov7 convert` has calibrated). Boxes are decoded in
            fp32 always.
        engine: "eager"; "compile": torch.compile with frozen weights, once per input shape, its
            results kept in the user's cache folder; "graph": our kernels, planned per input
            shape; on a CPU the kernels' plain references, slow, for checking. "auto" is graph on a
            GPU of compute capability 8.0 or later, else eager.

    Attributes:
        device: Where it runs.
        dtype: Of the input and the convolutions, fp8 apart.
        precision: "fp32", "fp16", "bf16" or "fp8".
        engine: "eager", "compile" or "graph".
        names: Class names by number.
        stride: Of the coarsest level; sides of the input are multiples of it.
        imgsz: Side in pixels that the model is meant for.
        title: The variant and its size, in words.
        one_shape: Whether every input should have the same shape: each is compiled for itself.

    Raises:
        UserError: The device, the precision or the engine is not to be had here.
    """

    def __init__(
        self,
        model: YOLOv7,
        *,
        device: str | torch.device = "auto",
        precision: str = "auto",
        engine: str = "auto",
    ) -> None:
        self.device = resolve_device(device)
        self.engine: str = _resolve_engine(engine, self.device)
        self.dtype = resolve_precision(precision, self.device, self.engine)
        self.precision = precision if precision == "fp8" else _NAMES[self.dtype]
        if precision == "fp8" and not model.ranges:
            raise UserError(
                "precision fp8 needs weights that are calibrated for it: "
                "yolov7 convert --precision fp8 --calibrate FOLDER"
            )
        self.one_shape = self.engine == "compile"
        self.names, self.stride, self.imgsz = model.names, model.stride, model.imgsz
        anchors = model.head.anchors.to(self.device, torch.float32)
        model = model.to(self.device).fuse().requires_grad_(False).to(self.dtype)
        model.head.anchors = anchors  # 459 pixels would be 460 in bf16
        parameters = sum(parameter.numel() for parameter in model.parameters())
        self.title = f"{model.variant.name}, {parameters / 1e6:.1f} M parameters"
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
        self._model, self._planned = model, dict[tuple[int, ...], "PlannedNetwork"]()
        self._lock = threading.Lock()
        self._forward: Callable[[Tensor], Tensor] = model
        if self.engine == "compile":
            _keep_compiled()
        if self.device.type == "cpu":
            keep_freed_memory()
            self._forward = self._on_cpu(model)
        elif self.engine == "compile":
            self._forward = _frozen(torch.compile(model, dynamic=False))

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Decoded boxes [B, N, 5 + classes] in fp32 of images x [B, 3, H, W], RGB in 0..1."""
        x = x.to(self.device, self.dtype).contiguous(memory_format=torch.channels_last)
        if self.engine == "graph":
            with self._lock:  # a plan has one set of buffers
                return self.planned(x.shape[0], x.shape[2], x.shape[3])(x)
        return self._forward(x)

    def _on_cpu(self, model: YOLOv7) -> Callable[[Tensor], Tensor]:
        outputs: Callable[[Tensor], list[Tensor]] = model.lead_outputs
        if self.engine == "compile":
            if self.dtype == torch.float32 and can_pack():
                from yolov7.engine.winograd import use_winograd  # loads the compiler

                use_winograd(model)
            outputs = _frozen(torch.compile(outputs, dynamic=False))
        elif self.engine == "eager" and can_pack():
            pack_convolutions(model)
        decode = Decoder(model.head)
        return lambda x: decode(outputs(x))

    def run_eagerly(self) -> None:
        """Leave the engine graph, and the memory of its plans, for eager."""
        self.engine, self._planned = "eager", {}

    def planned(self, *shape: int) -> "PlannedNetwork":
        """The plan for (batch, height, width); the latest few are kept."""
        from yolov7.engine.graph.planned import PlannedNetwork  # Triton is for those who want it

        network = self._planned.pop(shape, None)
        if network is None:
            ranges = self._model.ranges if self.precision == "fp8" else None
            network = PlannedNetwork(
                self._model, *shape, dtype=self.dtype, device=self.device, ranges=ranges
            )
        self._planned[shape] = network
        if len(self._planned) > PLANS:
            del self._planned[next(iter(self._planned))]
        return network


def load_network(
    weights: str | Path | None,
    *,
    variant: str | None = None,
    device: str | torch.device = "auto",
    precision: str = "auto",
    engine: str = "auto",
    imgsz: int | tuple[int, int] | None = None,
    names: Sequence[str] | None = None,
    layout: str | None = None,
) -> Network | ExportedNetwork:
    """The network of weights, or of an exported .onnx or .pt2 file.

    Args:
        weights: What `load_model` takes, or an exported file.
        variant: Of a bare state dict.
        device: See `Network` and `ExportedNetwork`.
        precision: Likewise; that of an exported file is its own.
        engine: Likewise.
        imgsz: Longer side, or (height, width), that is wanted; an exported file has its own.
        names: Class names of an ONNX file that is not ours.
        layout: Its layout, "grid" or "classes-first".

    Raises:
        UserError: The file cannot be read, or has not got what is wanted.
    """
    if weights is not None and Path(weights).suffix in SUFFIXES:
        network = ExportedNetwork(weights, device=device, engine=engine, names=names, layout=layout)
        network.check_wishes(variant=variant, precision=precision, imgsz=imgsz)
        return network
    if names or layout:
        raise UserError(f"{weights}: names and layout are for ONNX files: leave them out")
    model = load_model(weights, variant=variant)
    return Network(model, device=device, precision=precision, engine=engine)


def _resolve_engine(name: str, device: torch.device) -> Literal["eager", "compile", "graph"]:
    if name not in ("auto", "eager", "compile", "graph"):
        raise UserError(f"engine {name}: give auto, eager, compile or graph")
    if name == "compile":
        compilers = [os.environ.get("CXX", "g++"), "clang++"]
        if not any(shutil.which(compiler) for compiler in compilers):
            raise UserError("engine compile needs a C++ compiler: install g++, or use eager")
        return "compile"
    old = device.type == "cuda" and torch.cuda.get_device_capability(device) < OLDEST
    if name == "graph" and old:
        raise UserError(f"engine graph needs compute capability 8.0 or later: {device} is older")
    if name == "graph" or (name == "auto" and device.type == "cuda" and not old):
        return "graph"
    return "eager"


def _keep_compiled() -> None:
    """Have Inductor write into the user's cache folder, unless the user names another."""
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # Importing Inductor sets the variable to a folder under /tmp.
    if os.environ.get(COMPILED, default_cache_dir()) == default_cache_dir():
        os.environ[COMPILED] = str(cache_folder("inductor"))


def _frozen(compiled: Callable[[Tensor], T]) -> Callable[[Tensor], T]:
    """Compile with the weights as constants, which are packed then.

    As an option of `torch.compile` this reaches Inductor but not Dynamo, which would pass the
    weights as arguments: 41 ms instead of 20 for yolov7-tiny in bf16.
    """
    from torch._inductor import config

    def forward(x: Tensor) -> T:
        with config.patch(freezing=True):
            return compiled(x)

    return forward
