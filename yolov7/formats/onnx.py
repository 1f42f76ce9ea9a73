"""ONNX: a graph of standard operators, for ONNX Runtime, OpenVINO, TensorRT, browsers and more."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from yolov7.cores import cpu_quota, usable_cores
from yolov7.device import parse_device, resolve_device
from yolov7.errors import UserError
from yolov7.formats.base import Format, Session
from yolov7.formats.metadata import Metadata
from yolov7.formats.pt2 import unreadable

if TYPE_CHECKING:
    from torch.export import ExportedProgram


OPSET = 18  # of 2022: every runtime of today has it
OPSETS, PLAIN_OPSETS = range(18, 25), range(14, 25)  # that can be written


class Onnx(Format):
    """A graph of standard operators."""

    NAME = "onnx"
    SUFFIX = ".onnx"
    ABOUT = "runs anywhere"
    INSIDE = frozenset({"nms", "letterbox"})
    PRECISIONS = ("fp32", "fp16", "int8")
    ENGINES = ("openvino",)
    PACKAGES = ("onnx", "onnxscript", "onnxruntime")

    def __init__(self, opset: int = OPSET) -> None:
        self._opset = opset

    def at_opset(self, opset: int, *, plain: bool) -> "Onnx":
        """The format with operators of that version; older ones have no letterbox and no NMS."""
        if opset not in (known := PLAIN_OPSETS if plain else OPSETS):
            inside = "" if plain else " with a letterbox or NMS inside"
            raise UserError(f"opset {opset}: give {known[0]} to {known[-1]}{inside}")
        return Onnx(opset)

    def write(self, program: "ExportedProgram", path: Path, metadata: Metadata) -> str:
        """Write the network's graph, with the letterbox before it and suppression after it."""
        from yolov7.formats.onnx_graph import build_onnx

        path.write_bytes(build_onnx(program, metadata, self._opset).SerializeToString())
        return f"opset {self._opset}"

    def open(self, path: Path, device: str | torch.device, engine: str) -> Session:
        """Run it in ONNX Runtime, or in OpenVINO where the engine says so."""
        return OpenVino(path, device) if engine == "openvino" else OnnxRuntime(path, device)

    def reveal(self, path: Path, threshold: float) -> Session:
        """Run it in ONNX Runtime, with another threshold and the network's output as one more."""
        import onnx

        from yolov7.formats.onnx_graph import expose

        return OnnxRuntime(expose(onnx.load(path), threshold), "cpu")


class OnnxRuntime:
    """ONNX Runtime on a CPU or, where its GPU package is installed, on CUDA.

    Args:
        file: Path of the file, or what is in it.
        device: "auto", "cpu", "cuda", "cuda:N".
    """

    def __init__(self, file: Path | bytes, device: str | torch.device) -> None:
        name = "the graph" if isinstance(file, bytes) else str(file)
        chosen = parse_device("cuda" if device == "auto" else device)
        if chosen.type not in ("cpu", "cuda"):
            raise UserError(f"device {device}: ONNX Runtime runs on cpu or cuda: leave it out")
        if chosen.type == "cuda" and device != "auto" and torch.cuda.device_count():
            resolve_device(chosen)  # a PyTorch without CUDA cannot tell how many there are
        try:
            import onnxruntime
        except ImportError:
            raise UserError(
                f"{name}: running it needs ONNX Runtime: pip install 'yolov7-triton[export]'"
            ) from None
        cuda = "CUDAExecutionProvider"
        on_gpu = chosen.type == "cuda" and cuda in onnxruntime.get_available_providers()
        if chosen.type == "cuda" and not on_gpu and device != "auto":
            raise UserError(f"device {device}: ONNX Runtime has none: pip install onnxruntime-gpu")
        self.engine = "onnxruntime-cuda" if on_gpu else "onnxruntime"
        self.device = torch.device("cpu")
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; warnings are for the author of the graph
        if (quota := cpu_quota()) is not None:
            options.intra_op_num_threads = min(quota, usable_cores())
        providers = [*[(cuda, {"device_id": chosen.index or 0})] * on_gpu, "CPUExecutionProvider"]
        source = file if isinstance(file, bytes) else str(file)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=providers)
            (self._input, *_) = self._session.get_inputs()
            self.text: Mapping[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        except Exception as error:  # its exceptions share no base
            raise unreadable(name, "an ONNX file", error) from None
        self.shape: Sequence[int | None] | None = [
            d if isinstance(d, int) else None for d in self._input.shape
        ]
        types = {"tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
        self._type = types.get(self._input.type, np.float32)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs, as on the CPU."""
        array = np.ascontiguousarray(x.cpu().numpy().astype(self._type, copy=False))
        return [torch.from_numpy(y) for y in self._session.run(None, {self._input.name: array})]


class OpenVino:
    """OpenVINO on a CPU.

    Args:
        file: An ONNX file, or one of OpenVINO's own.
        device: "auto" or "cpu".
        before: Called with the graph before it is compiled, to look at it or to change it.
    """

    def __init__(
        self,
        file: Path,
        device: str | torch.device,
        before: Callable[[Any], None] | None = None,
    ) -> None:
        if device != "auto" and resolve_device(device).type != "cpu":
            raise UserError(f"device {device}: OpenVINO runs on a CPU: leave it out")
        try:
            import openvino
        except ImportError:
            raise UserError("engine openvino is not installed: pip install openvino") from None
        self.engine, self.device = "openvino", torch.device("cpu")
        core = openvino.Core()
        kind = "an OpenVINO model" if file.suffix == ".xml" else "an ONNX file"
        try:
            model = core.read_model(str(file))
            if before is not None:
                before(model)
            (port, *_) = model.inputs
            # by default it computes in bf16 where the processor can
            self._model = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        except UserError:
            raise
        except (RuntimeError, ValueError) as error:
            raise unreadable(str(file), kind, error) from None
        self.shape: Sequence[int | None] | None = [
            d.get_length() if d.is_static else None for d in port.partial_shape
        ]
        rt_info = model.rt_info["framework"] if "framework" in model.rt_info else {}  # noqa: SIM401  # no dict
        self.text: Mapping[str, str] = {key: str(value.value) for key, value in rt_info.items()}
        self._type = port.element_type.to_dtype()
        self._mine = threading.local()  # a request serves one call at a time

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs, as on the CPU."""
        if not hasattr(self._mine, "request"):
            self._mine.request = self._model.create_infer_request()
        result = self._mine.request.infer(x.cpu().numpy().astype(self._type, copy=False))
        return [torch.from_numpy(np.array(result[port])) for port in self._model.outputs]
