"""The door to the engines: which one runs these weights here, and how frames go through it."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

import torch

from yolov7.checkpoint import load_model
from yolov7.device import resolve_device
from yolov7.engine.eager import Network
from yolov7.engine.exported import ExportedNetwork
from yolov7.engine.faults import warn
from yolov7.engine.frames import Forward, HostFrames
from yolov7.errors import UserError
from yolov7.formats import is_exported
from yolov7.kernels.runtime import AMD, HAS_TRITON, PRECISIONS, unfit
from yolov7.letterbox import round_up
from yolov7.model import YOLOv7
from yolov7.suppression import Suppression
from yolov7.variants import LARGEST_IMGSZ

if TYPE_CHECKING:
    from yolov7.engine.graph.network import CapturedFrames

OLDEST = (8, 0)  # compute capability that the kernels are made for

Engine = Literal["auto", "eager", "compile", "graph", "openvino"]
Precision = Literal["auto", "fp32", "fp16", "bf16", "fp8", "int8"]
Layout = Literal["grid", "classes-first"]
EIGHT_BITS = ("fp8", "int8")
AnyNetwork = Network | ExportedNetwork


@dataclass(frozen=True, kw_only=True)
class Runtime:
    """Which weights run, where and how.

    Attributes:
        weights: A file (.safetensors, the authors' .pt, an exported .onnx, .xml or .pt2), the name
            of a published one, or a model, which is copied; None: the embedded demo weights.
        variant: Of a bare state dict, where its tensors do not tell.
        device: "auto", "cpu", "cuda", "cuda:N", "N" or "mps".
        precision: "auto" (fp16 on CUDA, else fp32), "fp32", "fp16", "bf16", or of weights that
            `yolov7 convert` has calibrated "int8" (eager on a CPU, graph) or "fp8" (graph).
        engine: "eager": PyTorch. "compile": torch.compile, once per input shape. "graph": our
            kernels, planned per input shape; on a CPU their plain references, slow, for checking.
            "openvino": of an .onnx file. "auto": of such a file ONNX Runtime; on a GPU of compute
            capability 8.0 or later graph, as far as it works there; else eager.
        imgsz: Longer side, or (height, width), that is wanted, in pixels; None: the weights' own.
        names: Class names of an .onnx file that is not ours.
        layout: Of its output, "grid" or "classes-first".
        trust: Load an exported file that may execute anything: a .pt2.
    """

    weights: str | Path | YOLOv7 | None = None
    variant: str | None = None
    device: str | torch.device = "auto"
    precision: str = "auto"
    engine: str = "auto"
    imgsz: int | tuple[int, int] | None = None
    names: Sequence[str] | None = None
    layout: str | None = None
    trust: bool = False


def open_network(runtime: Runtime) -> AnyNetwork:
    """The network that was asked for.

    Raises:
        UserError: The weights cannot be read, or this machine has not got what is wanted.
    """
    weights = runtime.weights
    if isinstance(weights, YOLOv7):
        model = copy.deepcopy(weights)
    elif weights is not None and is_exported(weights):
        return _open_exported(weights, runtime)
    else:
        model = load_model(weights, variant=runtime.variant)
    if runtime.names or runtime.layout:
        raise UserError(f"{weights}: names and layout are for ONNX files: leave them out")
    device = resolve_device(runtime.device)
    engine = resolve_engine(runtime.engine, device)
    precision = resolve_precision(runtime.precision, device, engine)
    if precision in EIGHT_BITS and precision not in model.ranges:
        raise UserError(
            f"precision {precision} needs weights that are calibrated for it: "
            f"yolov7 convert --precision {precision} --calibrate FOLDER"
        )
    if engine == "compile":
        from yolov7.engine.compile import CompiledNetwork

        return CompiledNetwork(model, device, precision)
    if engine == "graph":
        from yolov7.engine.graph.network import GraphNetwork

        return GraphNetwork(model, device, precision, required=runtime.engine == "graph")
    return Network(model, device, precision)


def open_frames(
    network: Forward, suppression: Suppression, batch: int = 1
) -> "HostFrames | CapturedFrames":
    """The way from frames to boxes that suits a network.

    Args:
        network: From `open_network`, or another.
        suppression: What is kept.
        batch: Images at a time.
    """
    if isinstance(network, Network) and network.engine == "graph":
        from yolov7.engine.graph.network import CapturedFrames, GraphNetwork

        assert isinstance(network, GraphNetwork)
        return CapturedFrames(network, suppression, batch)
    return HostFrames(network, suppression, batch)


def resolve_precision(name: str, device: torch.device, engine: str = "eager") -> str:
    """The precision of an option: "auto" is fp16 on CUDA and fp32 elsewhere.

    Raises:
        UserError: An unknown precision, or one that the device or the engine has not got.
    """
    if name == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if name not in PRECISIONS:
        raise UserError(f"precision {name}: give auto, {', '.join(PRECISIONS)}")
    if name == "fp8" and engine != "graph":
        raise UserError(f"precision fp8 needs engine graph, not {engine}")
    if name == "int8" and engine != "graph":
        if (device.type, engine) != ("cpu", "eager"):
            raise UserError(
                f"precision int8 needs engine graph, or eager on a CPU, not {engine} on {device}"
            )
        from yolov7.engine.int8 import sums_are_exact  # loads torch.fx

        if not sums_are_exact():
            raise UserError(
                "precision int8: this processor sums bytes in 16 bits (it has neither VNNI nor "
                "AMX): use fp32"
            )
    if name == "fp16" and device.type == "cpu" and engine != "graph":
        raise UserError("precision fp16 needs a GPU: use bf16 or fp32 on a CPU")
    return name


class Sized(Protocol):
    """A model, or what runs one."""

    @property
    def imgsz(self) -> int | tuple[int, int]:
        """Side, or (height, width), of the images that it is meant for, in pixels."""
        ...

    @property
    def stride(self) -> int:
        """Sides of its input are multiples of this."""
        ...


def fit(size: int | tuple[int, int] | None, model: Sized) -> tuple[int, int]:
    """What `--imgsz` means in every verb: (height, width), each rounded up to the model's stride.

    Args:
        size: Both sides, or (height, width), in pixels; None: what the model is meant for.
        model: Whose input it is.

    Raises:
        UserError: A side is below 1, over 4096 pixels, or not whole.
    """
    wanted = model.imgsz if size is None else size
    sides = wanted if isinstance(wanted, tuple) else (wanted, wanted)
    if not all(isinstance(side, int) and 1 <= side <= LARGEST_IMGSZ for side in sides):
        raise UserError(f"imgsz is {wanted}: give 1 to {LARGEST_IMGSZ} pixels")
    height, width = (round_up(side, model.stride) for side in sides)
    return height, width


def _open_exported(path: str | Path, runtime: Runtime) -> ExportedNetwork:
    network = ExportedNetwork(
        path,
        device=runtime.device,
        engine=runtime.engine,
        names=runtime.names,
        layout=runtime.layout,
        trust=runtime.trust,
    )
    network.check_wishes(variant=runtime.variant, precision=runtime.precision, imgsz=runtime.imgsz)
    return network


def resolve_engine(name: str, device: torch.device) -> str:
    """The engine of an option: "auto" is graph on a GPU that it is made for, else eager.

    On AMD's GPUs graph has to be asked for: its kernels compile for them; none has run there.

    Raises:
        UserError: An unknown engine, or one that the device has not got.
    """
    if name not in ("auto", "eager", "compile", "graph"):
        raise UserError(f"engine {name}: give auto, eager, compile or graph")
    cuda = device.type == "cuda"
    if device.type == "mps" and name not in ("auto", "eager"):
        raise UserError(f"engine {name} does not run on {device}: use eager")
    capability = torch.cuda.get_device_capability(device) if cuda else OLDEST
    old, wrong = capability < OLDEST, unfit(capability)
    if name == "graph" and old:
        raise UserError(f"engine graph needs compute capability 8.0 or later: {device} is older")
    if name == "graph" and cuda and not HAS_TRITON:
        raise UserError("engine graph on a GPU needs OpenAI Triton: pip install triton")
    if name == "graph" and wrong:
        raise UserError(f"engine graph: {wrong}")
    if name == "auto" and wrong:
        warn(f"engine graph is left for eager: {wrong}")
    if name == "auto":
        return "graph" if cuda and HAS_TRITON and not (old or wrong or AMD) else "eager"
    return name
