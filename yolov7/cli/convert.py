"""`yolov7 convert`: any weights that can be read, as safetensors."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yolov7.checkpoint import load_model, save_model
from yolov7.errors import UserError
from yolov7.info import parameter_count


@dataclass(kw_only=True)
class Convert:
    """Write weights in this project's safetensors format."""

    weights: str
    """the authors' .pt, a state dict under their names, a .safetensors, or a published name"""
    output: Path | None = None
    """file to write (None: the weights' name with .safetensors, in this folder)"""
    variant: str | None = None
    """variant of a bare state dict, where its tensors do not tell (None: recognised)"""
    precision: Literal["fp32", "fp16"] = "fp16"
    """type to store; the authors' files are fp16"""
    fuse: bool = False
    """fold batch norms, RepConv branches and implicit vectors: smaller, no longer trainable"""
    imgsz: int | None = None
    """image side to keep as the default (None: the variant's)"""


def run(options: Convert) -> int:
    """Convert, and say what was written."""
    output = options.output or Path(Path(options.weights).stem + ".safetensors")
    if output.suffix != ".safetensors":
        raise UserError(f"{output}: the output's name must end in .safetensors")
    model = load_model(options.weights, variant=options.variant)
    if options.imgsz is not None:
        model.imgsz = options.imgsz
    if options.fuse:
        model.fuse()
    save_model(model.half() if options.precision == "fp16" else model, output)
    print(
        f"{output}: {model.variant.name}, {model.form} form, {len(model.names)} classes, "
        f"{parameter_count(model):,} parameters, {output.stat().st_size / 2**20:.1f} MiB"
    )
    return 0
