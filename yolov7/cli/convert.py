"""`yolov7 convert`: any weights that can be read, as safetensors."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from yolov7.checkpoint import load_model, save_model
from yolov7.engine.choose import fit
from yolov7.engine.frames import to_input
from yolov7.engine.graph.calibrate import calibrate
from yolov7.errors import UserError, at_least_one
from yolov7.letterbox import letterbox, letterbox_geometry
from yolov7.model import parameter_count
from yolov7.progress import working
from yolov7.sources import Source


@dataclass(kw_only=True)
class Convert:
    """Write weights in this project's safetensors format."""

    weights: str
    """the authors' .pt, a state dict under their names, a .safetensors, or a published name"""
    output: Path | None = None
    """file to write (default: the weights' name with .safetensors, in this folder)"""
    variant: str | None = None
    """variant of a bare state dict, where its tensors do not tell (default: recognised)"""
    precision: Literal["fp32", "fp16", "fp8"] = "fp16"
    """type to store; the authors' files are fp16. fp8: fp16 weights and the ranges that the engine
    needs to run in fp8, from --calibrate"""
    calibrate: Path | None = None
    """folder with images that look like those to come, for fp8"""
    images: int = 32
    """of them at most, for fp8"""
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
    if (options.precision == "fp8") != (options.calibrate is not None):
        raise UserError("--precision fp8 and --calibrate FOLDER go together")
    at_least_one("images", options.images)
    model = load_model(options.weights, variant=options.variant)
    model.imgsz, _ = fit(options.imgsz, model)
    if options.calibrate is not None:
        with working(f"calibrating on images of {options.calibrate}"):
            batches = _batches(options.calibrate, options.images, model.imgsz)
            model.ranges = calibrate(copy.deepcopy(model).fuse(), batches)
    if options.fuse:
        model.fuse()
    save_model(model if options.precision == "fp32" else model.half(), output)
    calibrated = f", {len(model.ranges)} maps calibrated for fp8" if model.ranges else ""
    print(
        f"{output}: {model.variant.name}, {model.form} form, {len(model.names)} classes, "
        f"{parameter_count(model):,} parameters, {output.stat().st_size / 2**20:.1f} MiB"
        f"{calibrated}"
    )
    return 0


def _batches(folder: Path, most: int, side: int) -> Iterator[Tensor]:
    """Square letterboxed images [1, 3, side, side], evenly from the whole folder."""
    files = [Path(item.name) for item in Source(folder).items if item.kind == "image"]
    if not files:
        raise UserError(f"{folder}: has videos only: give a folder with images")
    count = min(most, len(files))
    chosen = [files[i * len(files) // count] for i in range(count)]
    for frame in islice(Source(chosen), count):
        where = letterbox_geometry(frame.shape, side)
        yield to_input([letterbox(frame.image, where)], torch.device("cpu"), torch.float32)
