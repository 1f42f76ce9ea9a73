"""`yolov7 convert`: any weights that can be read, as safetensors."""

import copy
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from yolov7.checkpoint import load_model, save_model
from yolov7.engine.choose import EIGHT_BITS, fit
from yolov7.engine.frames import to_input
from yolov7.engine.graph.calibrate import calibrate
from yolov7.errors import UserError, at_least_one
from yolov7.kernels.runtime import PRECISIONS
from yolov7.letterbox import letterbox, letterbox_geometry
from yolov7.model import YOLOv7, parameter_count
from yolov7.progress import working
from yolov7.sources import some_images

ENOUGH = 8  # images of a calibration


@dataclass(kw_only=True)
class Convert:
    """Write weights in this project's safetensors format."""

    weights: str
    """the authors' .pt, a state dict under their names, a .safetensors, or a published name"""
    output: Path | None = None
    """file to write (default: the weights' name with .safetensors, in this folder)"""
    variant: str | None = None
    """variant of a bare state dict, where its tensors do not tell (default: recognised)"""
    precision: Literal["fp32", "fp16", "fp8", "int8"] = "fp16"
    """type to store; the authors' files are fp16. fp8, int8: fp16 weights and the ranges that an
    engine needs to run in it, from --calibrate"""
    calibrate: Path | None = None
    """folder with images that look like those to come, for fp8 and int8"""
    images: int = 32
    """of them at most, for fp8 and int8"""
    fuse: bool = False
    """fold batch norms, RepConv branches and implicit vectors: smaller, no longer trainable"""
    imgsz: int | None = None
    """image side to keep in the file, rounded up to the model's stride (default: that of the
    weights)"""


def run(options: Convert) -> int:
    """Convert, and say what was written."""
    output = options.output or Path(Path(options.weights).stem + ".safetensors")
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: the output's name must end in .safetensors")
    if output.resolve() == Path(options.weights).resolve():
        raise UserError(f"{options.weights}: would be replaced: name another file with --output")
    if (options.precision in EIGHT_BITS) != (options.calibrate is not None):
        raise UserError("--precision int8 or fp8 and --calibrate FOLDER go together")
    at_least_one("images", options.images)
    model = load_model(options.weights, variant=options.variant)
    model.imgsz, _ = fit(options.imgsz, model)
    if options.calibrate is not None:
        with working(f"calibrating on images of {options.calibrate}"):
            fused = copy.deepcopy(model).fuse()
            batches = _batches(options.calibrate, options.images, model.imgsz, fused)
            ranges = calibrate(fused, batches, PRECISIONS[options.precision])
            model.ranges[options.precision] = ranges
    if options.fuse:
        model.fuse()
    save_model(model if options.precision == "fp32" else model.half(), output)
    counts = (f", {len(maps)} maps calibrated for {name}" for name, maps in model.ranges.items())
    print(
        f"{output}: {model.variant.name}, {model.form} form, {len(model.names)} classes, "
        f"{parameter_count(model):,} parameters, {output.stat().st_size / 2**20:.1f} MiB"
        f"{''.join(counts)}"
    )
    return 0


def _batches(folder: Path, most: int, side: int, model: YOLOv7) -> list[Tensor]:
    """Square letterboxed images [1, 3, side, side], evenly from the whole folder.

    Those that the model makes no numbers of are left out.
    """
    batches = []
    for frame in some_images(folder, most):
        where = letterbox_geometry(frame.shape, side)
        x = to_input([letterbox(frame.image, where)], torch.device("cpu"), torch.float32)
        with torch.no_grad():
            finite = model(x).isfinite().all()
        if finite:
            batches.append(x)
        else:
            print(f"left out: {frame.path}: the network's results are no numbers", file=sys.stderr)
    if not batches:
        raise UserError(f"{folder}: no image is left: calibrate with others, or other weights")
    if len(batches) < ENOUGH:
        said = f"ranges of {len(batches)} images say little of others: give {ENOUGH} or more"
        print(f"note: {folder}: {said}", file=sys.stderr)
    return batches
