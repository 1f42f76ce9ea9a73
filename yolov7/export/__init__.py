"""Files for other runtimes: ONNX, torch.export and AOTInductor, checked before they are kept.

exported = export(load_model("yolov7.pt"), Path("yolov7.onnx"), Settings(nms=Suppression()))
print(exported.report())
"""

from yolov7.export.report import Exported
from yolov7.export.write import Settings, export, fitted_size

__all__ = ["Exported", "Settings", "export", "fitted_size"]
