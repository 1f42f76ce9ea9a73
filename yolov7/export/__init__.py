"""Files for other runtimes: ONNX, torch.export and AOTInductor, checked before they are kept.

from pathlib import Path
from yolov7 import load_model
from yolov7.export import Settings, Suppression, export
nms = Suppression(conf=0.25, iou=0.45, max_det=300)
print(export(load_model(), Path("blood-cells.onnx"), Settings(nms=nms)))
"""

from yolov7.export.report import Exported
from yolov7.export.write import Settings, export, require_format
from yolov7.suppression import Suppression

__all__ = ["Exported", "Settings", "Suppression", "export", "require_format"]
