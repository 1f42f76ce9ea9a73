"""Formats that a model can be exported to, one module each: how a file is written, how it runs.

To add one, write a `Format` and name it in `FORMATS`: `yolov7 export` offers it, compares what it
writes with PyTorch, and every verb runs its files.
"""

from pathlib import Path

from yolov7.errors import UserError
from yolov7.formats.aoti import Aoti
from yolov7.formats.base import Format, Program, Session
from yolov7.formats.onnx import Onnx
from yolov7.formats.openvino import OpenVinoIr
from yolov7.formats.torch_export import TorchExport

__all__ = ["FORMATS", "Format", "Program", "Session", "format_of", "is_exported"]

FORMATS: dict[str, Format] = {
    made.NAME: made for made in (Onnx(), OpenVinoIr(), TorchExport(), Aoti())
}


def is_exported(path: str | Path) -> bool:
    """Whether a name is that of an exported file, and not of weights."""
    return any(Path(path).suffix == made.SUFFIX for made in FORMATS.values())


def format_of(path: Path) -> Format:
    """The format of a file.

    Raises:
        UserError: It is of none, or damaged.
    """
    for made in FORMATS.values():
        if path.suffix == made.SUFFIX and made.holds(path):
            return made
    raise UserError(f"{path}: not written by `yolov7 export`, or by a later version")
