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

_MODULES = {
    "Detector": "detector",
    "Results": "results",
    "YOLOv7": "model",
    "create_model": "model",
    "load_model": "checkpoint",
    "save_model": "checkpoint",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import yolov7` stays cheap."""
    if name not in _MODULES:
        raise AttributeError(f"module 'yolov7' has no attribute {name!r}")
    return getattr(import_module(f"yolov7.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    """What there is to complete: the public names, imported or not."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
