"""Writing a model for another runtime."""

import copy
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from yolov7 import __version__
from yolov7.atomic import atomic
from yolov7.engine.choose import fit
from yolov7.errors import UserError
from yolov7.export.check import check, sample_images
from yolov7.export.quantised import Quantised
from yolov7.export.report import Exported
from yolov7.formats import FORMATS
from yolov7.formats.metadata import FORMAT, Metadata, Precision
from yolov7.model import YOLOv7
from yolov7.suppression import Suppression


@dataclass(frozen=True)
class Settings:
    """What to export.

    Attributes:
        kind: Key of `yolov7.formats.FORMATS`: "onnx", "openvino" (an .xml and a .bin beside it),
            "torch-export" (a .pt2 that any PyTorch of this version runs) or "aoti" (a .pt2 compiled
            for this machine's processor, or for CUDA).
        imgsz: Side, or (height, width), in pixels, rounded up to the model's stride; None: the
            model's.
        batch: Images per call, or "dynamic".
        precision: Of weights and convolutions; inputs and outputs are fp32. "int8" (onnx, openvino)
            wants the ranges that `yolov7 convert --precision int8` leaves in weights.
        images: Folder of images to compare the file on, such as those of the calibration; None:
            three photographs.
        layout: See `Metadata`; not with `nms`, whose layout is its own.
        nms: Suppress inside the graph, with this conf, iou and max_det (onnx, openvino).
        letterbox: Take one image of any size as it comes from a camera (likewise).
        device: For .pt2: "cpu" or "cuda".
        opset: Version of ONNX's operators, 14 to 24, from 18 with `nms` or `letterbox`; None: 18.
    """

    kind: str = "onnx"
    imgsz: int | tuple[int, int] | None = None
    batch: int | Literal["dynamic"] = 1
    precision: Precision = "fp32"
    layout: Literal["grid", "classes-first"] = "grid"
    nms: Suppression | None = None
    letterbox: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    opset: int | None = None
    images: Path | None = None


PARTS = slice(0, 4), slice(4, 5), slice(5, None)  # of a prediction: box, objectness, classes


class Deploy(nn.Module):
    """What goes into the file: a fused model between fp32 images and the layout of the output."""

    def __init__(self, model: YOLOv7 | Quantised, layout: str) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.dtype = next(model.parameters()).dtype

    def forward(self, images: Tensor) -> Tensor:
        predictions: Tensor = self.model(images.to(self.dtype))
        if self.layout != "classes-first":
            return predictions
        # Slices: a split has no form in older opsets.
        boxes, objectness, classes = (predictions[..., part] for part in PARTS)
        scores = objectness if classes.shape[2] == 1 else objectness * classes
        return torch.cat((boxes, scores), 2).transpose(1, 2)


def export(model: YOLOv7, path: Path, settings: Settings) -> Exported:
    """Write a model for another runtime, run the file, and keep it if it does what the model does.

    Args:
        model: In any form; it is not changed.
        path: Of the file, ending in the format's suffix. An older file is replaced at the end.
        settings: What to write.

    Raises:
        UserError: The settings do not fit each other or the model, something is not installed, the
            target cannot be written, or the file's results are not the model's.
    """
    start = time.perf_counter()
    require_format(settings.kind)
    metadata = _metadata(model, settings)
    images = sample_images(settings.images)
    made = FORMATS[settings.kind]
    if settings.opset is not None:
        plain = settings.nms is None and not settings.letterbox
        made = made.at_opset(settings.opset, plain=plain)
    if path.suffix != made.SUFFIX:
        raise UserError(f"{path}: the name of a {made.NAME} file must end in {made.SUFFIX}")
    with atomic(path) as temporary:
        temporary.touch()  # what cannot be written fails before the work
        try:
            note = made.write(_program(model, metadata), temporary, metadata)
            result = check(temporary, path, metadata, _reference(model, metadata), images)
            if made.PART:
                temporary.with_suffix(made.PART).replace(path.with_suffix(made.PART))
        finally:
            if made.PART:
                temporary.with_suffix(made.PART).unlink(missing_ok=True)
    seconds = time.perf_counter() - start
    return Exported(path, metadata, path.stat().st_size, note, result, seconds)


def require_format(kind: str) -> None:
    """See whether a format can be written here.

    Raises:
        UserError: There is no such format, or what it needs is not installed.
    """
    if kind not in FORMATS:
        raise UserError(f"format {kind}: choose from {', '.join(FORMATS)}")
    made = FORMATS[kind]
    for name in made.PACKAGES:
        try:
            import_module(name)
        except ImportError:
            raise UserError(
                f"{name} is not installed: pip install 'yolov7-triton[{made.EXTRA}]'"
            ) from None


def _metadata(model: YOLOv7, settings: Settings) -> Metadata:
    nms = settings.nms
    _check_inside(settings)
    if nms is not None and nms != Suppression(conf=nms.conf, iou=nms.iou, max_det=nms.max_det):
        raise UserError("NMS inside has no more than conf, iou and max_det: leave the others out")
    if nms is not None and settings.layout != "grid":
        raise UserError("with NMS inside, the output is detections: leave the layout out")
    if settings.precision == "int8" and "int8" not in model.ranges:
        raise UserError(
            "precision int8: these weights have no ranges for it: "
            "yolov7 convert --precision int8 --calibrate FOLDER makes weights that do"
        )
    if settings.letterbox and settings.batch != 1:
        raise UserError("with the letterbox inside, one image goes in: leave the batch out")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: there is no GPU here")
    try:
        return Metadata(
            format=FORMAT,
            kind=settings.kind,
            variant=model.variant.name,
            names=list(model.names),
            stride=model.stride,
            imgsz=fit(settings.imgsz, model),
            batch=settings.batch,
            precision=settings.precision,
            layout=settings.layout if nms is None else "detections",
            letterbox=settings.letterbox,
            nms=nms,
            device=settings.device,
            version=__version__,
        )
    except ValueError as error:
        raise UserError(str(error)) from None


def _check_inside(settings: Settings) -> None:
    """Whether the format takes what is asked for."""
    made = FORMATS[settings.kind]
    for name, wanted in (("nms", settings.nms is not None), ("letterbox", settings.letterbox)):
        if wanted and name not in made.INSIDE:
            others = [other.NAME for other in FORMATS.values() if name in other.INSIDE]
            raise UserError(f"{made.NAME} has no {name} inside: export {' or '.join(others)}")
    if settings.precision not in made.PRECISIONS:
        others = [
            other.NAME for other in FORMATS.values() if settings.precision in other.PRECISIONS
        ]
        raise UserError(f"{made.NAME} has no {settings.precision}: export {' or '.join(others)}")
    if settings.device not in (made.DEVICES or ("cpu",)):
        raise UserError(f"{made.NAME} files run anywhere: leave device {settings.device} out")


def _reference(model: YOLOv7, metadata: Metadata) -> Deploy:
    """What the file is compared with: the model as it came, in fp32 and not fused."""
    model = copy.deepcopy(model).requires_grad_(False).float()
    return Deploy(model, metadata.layout).to(metadata.device).eval()


def _program(model: YOLOv7, metadata: Metadata) -> ExportedProgram:
    """The model fused, in the file's precision, as a graph of PyTorch's operators."""
    model = copy.deepcopy(model).requires_grad_(False).float().fuse()
    if metadata.precision == "fp16":
        anchors = model.head.anchors
        model.half().head.anchors = anchors  # boxes are decoded in fp32
    predictor = Quantised(model) if metadata.precision == "int8" else model
    network = Deploy(predictor, metadata.layout).to(metadata.device).eval()
    # With an example of one image, torch.export would take the one for a constant.
    batch = 2 if metadata.batch == "dynamic" else metadata.batch
    images = torch.zeros(batch, 3, *metadata.imgsz, device=metadata.device)
    dynamic = ({0: Dim("batch", min=1)},) if metadata.batch == "dynamic" else None
    with torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=dynamic)
