"""OpenVINO's intermediate representation: an .xml with the graph, and a .bin with its tensors.

It is made of the ONNX graph, whose metadata OpenVINO keeps. The .xml names the digest of its .bin:
a pair that does not belong together is refused.
"""

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from yolov7.errors import UserError
from yolov7.formats.base import Format, Session
from yolov7.formats.metadata import Metadata
from yolov7.formats.onnx import OPSET, OpenVino

if TYPE_CHECKING:
    from torch.export import ExportedProgram

DIGEST = ("yolov7", "sha256_of_bin")  # where the .xml has it


class OpenVinoIr(Format):
    """A graph for OpenVINO alone."""

    NAME = "openvino"
    SUFFIX = ".xml"
    PART = ".bin"
    ABOUT = "an .xml and a .bin"
    INSIDE = frozenset({"nms", "letterbox"})
    PRECISIONS = ("fp32", "fp16", "int8")
    ENGINES = ("openvino",)
    PACKAGES = ("onnx", "onnxscript", "openvino")
    EXTRA = "openvino"

    def write(self, program: "ExportedProgram", path: Path, metadata: Metadata) -> str:
        """Write the ONNX graph as OpenVINO reads it."""
        import openvino

        from yolov7.formats.onnx_graph import build_onnx

        model = openvino.Core().read_model(build_onnx(program, metadata, OPSET).SerializeToString())
        openvino.save_model(model, path, compress_to_fp16=False)
        model.set_rt_info(_digest(path), list(DIGEST))
        openvino.save_model(model, path, compress_to_fp16=False)
        return f"with {path.with_suffix(self.PART).stat().st_size / 2**20:.1f} MiB in its .bin"

    def open(self, path: Path, device: str | torch.device, engine: str) -> Session:  # noqa: ARG002
        """Run it in OpenVINO."""

        def check(model: Any) -> None:
            keys = list(DIGEST)
            told = model.get_rt_info(keys).value if model.has_rt_info(keys) else ""
            if told != _digest(path):
                raise UserError(f"{path}: its {self.PART} is another file's: export it again")

        return OpenVino(path, device, check)

    def reveal(self, path: Path, threshold: float) -> Session:
        """Run it with another threshold and the network's output as one more."""
        from yolov7.formats.onnx_graph import DECODED, THRESHOLD

        def change(model: Any) -> None:
            from openvino import opset1

            (constant,) = [op for op in model.get_ops() if op.get_friendly_name() == THRESHOLD]
            other = opset1.constant(np.full(constant.data.shape, threshold, np.float32))
            constant.output(0).replace(other.output(0))
            model.add_outputs(DECODED)

        return OpenVino(path, "cpu", change)


def _digest(path: Path) -> str:
    """Of the tensors beside a file."""
    with path.with_suffix(OpenVinoIr.PART).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
