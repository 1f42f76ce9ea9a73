"""YOLOv7 object detection with hand-written OpenAI Triton kernels."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from yolov7.checkpoint import load_model, save_model
    from yolov7.detector import Detector
    from yolov7.model import YOLOv7, create_model
    from yolov7.results import Results

__version__ = "0.1.0"

__all__ = ["Detector", "Results", "YOLOv7", "create_model", "load_model", "save_model"]

_ROOMS = {
    "Detector": "detector",
    "Results": "results",
    "YOLOv7": "model",
    "create_model": "model",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import yolov7` stays cheap."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'yolov7' has no attribute {name!r}")
    return getattr(import_module(f"yolov7.{_ROOMS[name]}"), name)
