"""Writing a model for another runtime."""

import copy
import json
import time
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from yolov7 import __version__
from yolov7.atomic import atomic
from yolov7.engine.exported import FORMAT, PT2_ENTRY, Kind, Metadata, Precision, Suppression
from yolov7.errors import UserError
from yolov7.export.check import check
from yolov7.export.report import Exported
from yolov7.kernels.nms.reference import CLASS_OFFSET
from yolov7.model import YOLOv7

SUFFIX: dict[Kind, str] = {"onnx": ".onnx", "torch-export": ".pt2", "aoti": ".pt2"}


@dataclass(frozen=True)
class Settings:
    """What to export.

    Attributes:
        kind: "onnx", "torch-export" (a .pt2 that any PyTorch of this version runs) or "aoti" (a
            .pt2 compiled for this machine's processor, or for CUDA).
        imgsz: (height, width) in pixels, multiples of the model's stride; None: the model's.
        batch: Images per call, or "dynamic".
        precision: Of weights and convolutions; inputs and outputs are fp32.
        layout: See `Metadata`; not with `nms`, whose layout is its own.
        nms: Suppress inside the graph, with these thresholds (onnx).
        letterbox: Take one image of any size as it comes from a camera (onnx).
        device: For .pt2: "cpu" or "cuda".
    """

    kind: Kind = "onnx"
    imgsz: tuple[int, int] | None = None
    batch: int | Literal["dynamic"] = 1
    precision: Precision = "fp32"
    layout: Literal["grid", "classes-first"] = "grid"
    nms: Suppression | None = None
    letterbox: bool = False
    device: str = "cpu"


class Deploy(nn.Module):
    """What goes into the file: a fused model between fp32 images and the layout of the output."""

    def __init__(self, model: YOLOv7, layout: str) -> None:
        super().__init__()
        self.model = model
        self.layout = layout
        self.dtype = next(model.parameters()).dtype

    def forward(self, images: Tensor) -> Tensor:
        predictions: Tensor = self.model(images.to(self.dtype))
        if self.layout != "classes-first":
            return predictions
        boxes, objectness, classes = torch.split(predictions, [4, 1, predictions.shape[2] - 5], 2)
        scores = objectness if classes.shape[2] == 1 else objectness * classes
        return torch.cat((boxes, scores), 2).transpose(1, 2)


def export(model: YOLOv7, path: Path, settings: Settings) -> Exported:
    """Write a model for another runtime, run the file, and keep it if it does what the model does.

    Args:
        model: In any form; it is not changed.
        path: Of the file, ending in `SUFFIX` of its kind. An older file is replaced at the end.
        settings: What to write.

    Raises:
        UserError: The settings do not fit each other or the model, something is not installed, the
            target cannot be written, or the file's results are not the model's.
    """
    start = time.perf_counter()
    metadata = _metadata(model, settings)
    _check_target(path, settings)
    if settings.kind == "onnx":
        _require_onnx()
    with atomic(path) as temporary:
        temporary.touch()  # what cannot be written fails before the work
        opset = _write(_program(model, metadata), temporary, metadata)
        result = check(temporary, path, metadata, _reference(model, metadata))
    seconds = time.perf_counter() - start
    return Exported(path, metadata, path.stat().st_size, opset, result, seconds)


def fitted_size(imgsz: tuple[int, int], stride: int) -> tuple[int, int]:
    """(height, width) rounded up to multiples of the stride."""
    height, width = imgsz
    if min(height, width) < 1:
        raise UserError(f"imgsz is {height} x {width}: give 1 or more")
    return -(-height // stride) * stride, -(-width // stride) * stride


def _metadata(model: YOLOv7, settings: Settings) -> Metadata:
    onnx, nms = settings.kind == "onnx", settings.nms
    if not onnx and (nms is not None or settings.letterbox):
        raise UserError(f"{settings.kind} has neither NMS nor letterbox inside: export onnx")
    if nms is not None and settings.layout != "grid":
        raise UserError("with NMS inside, the output is detections: leave the layout out")
    if settings.letterbox and settings.batch != 1:
        raise UserError("with the letterbox inside, one image goes in: leave the batch out")
    if settings.batch != "dynamic" and settings.batch < 1:
        raise UserError(f"batch is {settings.batch}: give 1 or more, or dynamic")
    if onnx and settings.device != "cpu":
        raise UserError(f"an ONNX file runs anywhere: leave device {settings.device} out")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise UserError("device cuda: there is no GPU here")
    if nms is not None and not (0 <= nms.conf <= 1 and 0 <= nms.iou <= 1 and nms.max_det >= 1):
        raise UserError(f"conf {nms.conf} and iou {nms.iou}: give 0 to 1; max_det: 1 or more")
    imgsz = fitted_size(settings.imgsz or (model.imgsz, model.imgsz), model.stride)
    if nms is not None and len(model.names) > 1 and max(imgsz) > CLASS_OFFSET:
        raise UserError(
            f"imgsz is {imgsz[0]} x {imgsz[1]}: NMS inside keeps classes apart up to "
            f"{CLASS_OFFSET:.0f} pixels: give less, or leave it out"
        )
    return Metadata(
        format=FORMAT,
        kind=settings.kind,
        variant=model.variant.name,
        names=list(model.names),
        stride=model.stride,
        imgsz=imgsz,
        batch=settings.batch,
        precision=settings.precision,
        layout=settings.layout if nms is None else "detections",
        letterbox=settings.letterbox,
        nms=nms,
        device=settings.device,
        version=__version__,
    )


def _check_target(path: Path, settings: Settings) -> None:
    suffix = SUFFIX[settings.kind]
    if path.suffix != suffix:
        raise UserError(f"{path}: the name of a {settings.kind} file must end in {suffix}")
    if path.is_dir():
        raise UserError(f"{path}: is a folder: give the name of a file")


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
    network = Deploy(model, metadata.layout).to(metadata.device).eval()
    # With an example of one image, torch.export would take the one for a constant.
    batch = 2 if metadata.batch == "dynamic" else metadata.batch
    images = torch.zeros(batch, 3, *metadata.imgsz, device=metadata.device)
    dynamic = ({0: Dim("batch", min=1)},) if metadata.batch == "dynamic" else None
    with torch.no_grad():
        return torch.export.export(network, (images,), dynamic_shapes=dynamic)


def _write(program: ExportedProgram, path: Path, metadata: Metadata) -> int | None:
    """Write the file; the opset of an ONNX file."""
    if metadata.kind == "onnx":
        from yolov7.export.onnx_graph import OPSET, build_onnx

        path.write_bytes(build_onnx(program, metadata).SerializeToString())
        return OPSET
    extra = {PT2_ENTRY: json.dumps(metadata.to_text())}
    if metadata.kind == "torch-export":
        program.example_inputs = None  # images of zeros, of no use to anyone
        torch.export.save(program, path, extra_files=extra)
    else:
        _compile(program, path, extra)
    return None


def _require_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        try:
            import_module(name)
        except ImportError:
            raise UserError(
                f"{name} is not installed: pip install 'yolov7-triton[export]'"
            ) from None


def _compile(program: ExportedProgram, path: Path, extra: dict[str, str]) -> None:
    # packages as torch._inductor.aoti_compile_and_package does, which takes no extra files
    from torch.export.pt2_archive._package import package_pt2

    assert program.example_inputs is not None
    options: dict[str, Any] = {"aot_inductor.package": True, "freezing": True}
    with torch.no_grad():
        files = torch._inductor.aot_compile(
            program.module(), program.example_inputs[0], options=options
        )
    assert isinstance(files, list)
    package_pt2(path, aoti_files=files, extra_files=extra)
