"""`yolov7 export`: a model as a file for another runtime."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from yolov7.checkpoint import DEMO_WEIGHTS, load_model
from yolov7.export import Settings, Suppression, export
from yolov7.formats import FORMATS
from yolov7.progress import working

if TYPE_CHECKING:
    FormatName = str
else:
    FormatName = tyro.extras.literal_type_from_choices(FORMATS)
_ABOUT = "; ".join(f"{made.NAME}: {made.ABOUT}" for made in FORMATS.values())


@dataclass(kw_only=True)
class Export:
    """Write a model for ONNX Runtime, TensorRT, OpenVINO, browsers or PyTorch without its code."""

    weights: str | None = None
    """.safetensors, the authors' .pt, or a published name such as yolov7.pt (default: the embedded
    blood-cell demo weights)"""
    variant: str | None = None
    """variant of a bare state dict, where its tensors do not tell (default: recognised)"""
    output: Path | None = None
    """file to write (default: the weights' name with .onnx, .xml or .pt2, in this folder)"""
    format: Annotated[FormatName, tyro.conf.arg(help=_ABOUT)] = "onnx"
    imgsz: int | tuple[int, int] | None = None
    """side, or height and width, in pixels, rounded up to the model's stride (default: the
    checkpoint's)"""
    batch: int | Literal["dynamic"] = 1
    """images per call"""
    nms: Literal["none", "onnx"] = "none"
    """onnx: suppress inside the graph, with standard operators"""
    precision: Literal["fp32", "fp16", "int8"] = "fp32"
    """of weights and convolutions; inputs and outputs are fp32. int8 (onnx, openvino): of weights
    that yolov7 convert has calibrated"""
    images: Path | None = None
    """folder with images to compare the file on, 32 of them, such as those of the calibration
    (default: three photographs)"""
    layout: Literal["grid", "classes-first"] = "grid"
    """grid: [B, N, 5 + classes] as the authors have it; classes-first: [B, 4 + classes, N], scores
    multiplied by the objectness"""
    with_letterbox: bool = False
    """take one uint8 image [H, W, 3] (BGR) of any size; boxes are in its pixels"""
    conf: float = 0.25
    """with --nms onnx: confidence that a box must exceed, 0 to 1"""
    iou: float = 0.45
    """with --nms onnx: overlap with a surer box of its class above which one is dropped, 0 to 1"""
    max_det: int = 300
    """with --nms onnx: boxes per image at most"""
    opset: int | None = None
    """version of ONNX's operators, 14 to 24, with something inside from 18 (default: 18)"""
    device: Literal["cpu", "cuda"] = "cpu"
    """where a .pt2 is to run"""


def run(options: Export) -> int:
    """Export, compare with PyTorch, and say what there is now."""
    model = load_model(options.weights, variant=options.variant)
    stem = Path(options.weights or DEMO_WEIGHTS).stem
    settings = Settings(
        kind=options.format,
        imgsz=options.imgsz,
        batch=options.batch,
        precision=options.precision,
        layout=options.layout,
        nms=Suppression(conf=options.conf, iou=options.iou, max_det=options.max_det)
        if options.nms == "onnx"
        else None,
        letterbox=options.with_letterbox,
        device=options.device,
        opset=options.opset,
        images=options.images,
    )
    output = options.output or Path(stem + FORMATS[options.format].SUFFIX)
    with working(f"exporting {output}"):
        exported = export(model, output, settings)
    print(exported)
    return 0
