"""`yolov7 info`: what a model is made of."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from rich.console import Console
from rich.table import Table

from yolov7.checkpoint import load_model
from yolov7.errors import UserError
from yolov7.info import Layer, conv_layers, parameter_count
from yolov7.model import Form, YOLOv7, create_model
from yolov7.variants import VARIANTS


@dataclass(kw_only=True)
class Info:
    """Show layers, shapes, parameters and FLOPs, by stage and in all."""

    model: Annotated[str, tyro.conf.Positional]
    """a variant, such as yolov7-w6, or a weights file"""
    imgsz: int | None = None
    """side of the square image in pixels (None: the model's own)"""
    form: Form = "fused"
    """with training branches, as published, or folded for inference"""
    classes: int = 80
    """number of classes of a variant that is named"""
    json: Path | None = None
    """write the rows and totals to this file"""


def run(options: Info) -> int:
    """Print the table; write the JSON that was asked for."""
    model = _model(options)
    size = options.imgsz or model.imgsz
    if size < 1 or size % model.stride:
        raise UserError(f"--imgsz {size} is not a multiple of the model's stride {model.stride}")
    rows = conv_layers(model, size, size)
    totals = {
        "variant": model.variant.name,
        "form": model.form,
        "imgsz": size,
        "layers": len(rows),
        "parameters": parameter_count(model),
        "flops": sum(row.flops for row in rows),
    }
    _print(rows, totals)
    if options.json is not None:
        result = {"rows": [asdict(row) for row in rows], "totals": totals}
        try:
            options.json.write_text(json.dumps(result, indent=1))
        except OSError as error:
            raise UserError(f"{options.json}: cannot be written ({error.strerror})") from None
    return 0


def _model(options: Info) -> YOLOv7:
    if options.model not in VARIANTS:
        model = load_model(options.model)
        if options.form == "fused":
            return model.fuse()
        if options.form != model.form:
            raise UserError(f"{options.model} holds the {model.form} form")
        return model
    try:
        unfused: Literal["training", "deploy"] = (
            "training" if options.form == "training" else "deploy"
        )
        model = create_model(options.model, options.classes, form=unfused)
    except ValueError as error:
        raise UserError(str(error)) from None
    return model.fuse() if options.form == "fused" else model


def _print(rows: list[Layer], totals: dict[str, Any]) -> None:
    table = Table(title="{variant}, {form}, {imgsz} x {imgsz}".format(**totals))
    for heading in ("layer", "kernel", "input", "output", "parameters", "GFLOPs"):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    stages: dict[str, list[Layer]] = {}
    for row in rows:
        stages.setdefault(row.stage, []).append(row)
    for stage, layers in stages.items():
        for layer in layers:
            table.add_row(
                layer.name,
                f"{layer.kernel}x{layer.kernel}/{layer.stride}",
                f"{layer.in_channels} x {layer.height} x {layer.width}",
                f"{layer.out_channels} x {layer.out_height} x {layer.out_width}",
                f"{layer.parameters:,}",
                f"{layer.flops / 1e9:.3f}",
            )
        parameters = sum(layer.parameters for layer in layers)
        flops = sum(layer.flops for layer in layers)
        table.add_row(
            f"[bold]{stage}[/]", "", "", "", f"[bold]{parameters:,}[/]",
            f"[bold]{flops / 1e9:.3f}[/]", end_section=True,
        )  # fmt: skip
    console = Console()
    console.print(table)
    console.print(
        f"{totals['layers']} convolutions, {totals['parameters']:,} parameters, "
        f"{totals['flops'] / 1e9:.1f} GFLOPs (two per multiply-add)"
    )
