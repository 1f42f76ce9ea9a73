"""The verb `yolov7 info`: its options and tables, of layers and of the engine's plan."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from yolov7.checkpoint import load_model
from yolov7.engine.choose import fit
from yolov7.engine.graph.plan import make_plan
from yolov7.engine.graph.planned import described, expected_seconds
from yolov7.engine.graph.trace import trace
from yolov7.engine.int8 import scales_of
from yolov7.errors import UserError, at_least_one
from yolov7.kernels.runtime import H200, recording
from yolov7.layers import conv_layers
from yolov7.model import Form, YOLOv7, create_model, parameter_count
from yolov7.runs import write_json
from yolov7.variants import VARIANTS

CAPABILITY = 9, 0
"""Of an H200."""


@dataclass(kw_only=True)
class Info:
    """Show layers, shapes, parameters and FLOPs, by stage and in all."""

    model: Annotated[str, tyro.conf.Positional]
    """a variant, such as yolov7-w6, or a weights file"""
    imgsz: int | None = None
    """side of the square image in pixels, rounded up to the model's stride (default: the model's
    own)"""
    form: Form = "fused"
    """with training branches, as published, or folded for inference"""
    classes: int = 80
    """number of classes of a variant that is named"""
    plan: bool = False
    """show the inference engine's plan instead: steps, buffers, traffic, expected time at the
    device's ceilings and by the cost model"""
    batch: int = 1
    """images of the plan"""
    precision: Literal["int8"] | None = None
    """show instead which maps of calibrated weights are kept in eight bits, and with what steps"""
    json: Path | None = None
    """write the rows and totals to this file"""


def run(options: Info) -> int:
    """Print the table; write the JSON that was asked for."""
    model = _model(options)
    size, _ = fit(options.imgsz, model)
    if options.plan and options.precision is not None:
        raise UserError("--plan and --precision are two tables: ask for one")
    if options.precision is not None:
        result = _show_precision(model, options.precision, size)
    elif options.plan:
        result = _show_plan(model, options.batch, size)
    else:
        result = _show_layers(model, size)
    write_json(options.json, result)
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


def _table(title: str, headings: Sequence[str]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left", no_wrap=True)
    return table


def _console() -> Console:
    """As wide as the terminal; in a file or pipe wide enough for the tables."""
    return Console(width=None if sys.stdout.isatty() else 180, markup=False)


def _show_layers(model: YOLOv7, size: int) -> dict[str, Any]:
    rows = conv_layers(model, size, size)
    totals: dict[str, Any] = {
        "variant": model.variant.name,
        "form": model.form,
        "imgsz": size,
        "layers": len(rows),
        "parameters": parameter_count(model),
        "flops": sum(row.flops for row in rows),
    }
    table = _table(
        f"{model.variant.name}, {model.form}, {size} x {size}",
        ("layer", "kernel", "input", "output", "parameters", "GFLOPs"),
    )
    for stage, group in groupby(rows, key=lambda row: row.stage):
        layers = list(group)
        for layer in layers:
            table.add_row(
                layer.name,
                f"{layer.kernel}x{layer.kernel}/{layer.stride}",
                f"{layer.in_channels} x {layer.height} x {layer.width}",
                f"{layer.out_channels} x {layer.out_height} x {layer.out_width}",
                f"{layer.parameters:,}",
                f"{layer.flops / 1e9:.3f}",
            )
        parameters = f"{sum(layer.parameters for layer in layers):,}"
        gflops = f"{sum(layer.flops for layer in layers) / 1e9:.3f}"
        table.add_row(stage, "", "", "", parameters, gflops, style="bold", end_section=True)
    console = _console()
    console.print(table)
    console.print(
        f"{totals['layers']} convolutions, {totals['parameters']:,} parameters, "
        f"{totals['flops'] / 1e9:.1f} GFLOPs (two per multiply-add)"
    )
    return {"rows": [asdict(row) for row in rows], "totals": totals}


def _show_plan(model: YOLOv7, batch: int, size: int) -> dict[str, Any]:
    if model.form != "fused":
        raise UserError(f"--plan lowers the fused form, not --form {model.form}")
    at_least_one("batch", batch)
    plan = make_plan(model, batch, size, size)
    launches = described(model.to("meta"), batch, size, size, torch.float16)
    with recording(CAPABILITY):
        modelled = expected_seconds(plan, launches)
    rows: list[dict[str, Any]] = [
        {
            "step": i,
            "kernel": step.kind,
            "name": ", ".join(task.name for task in step.tasks),
            "shape": "; ".join(task.describe() for task in step.tasks),
            "bytes": plan.step_bytes(step),
            "weight_bytes": plan.step_weight_bytes(step),
            "flops": plan.step_flops(step),
            "seconds": plan.step_seconds(step),
            "modelled_seconds": [min(modelled[i]), max(modelled[i])],
            "buffers": [w.describe() for task in step.tasks for w in task.writes],
        }
        for i, step in enumerate(plan.steps)
    ]
    totals: dict[str, Any] = plan.totals()
    whole = [sum(corner) for corner in zip(*modelled, strict=True)]
    totals["modelled_seconds"] = [min(whole), max(whole)]
    table = _table(
        f"{model.variant.name}, batch {batch}, {size} x {size}, fp16, expected on an {H200.name}",
        ("step", "kernel", "shape", "map MB", "weight MB", "GFLOPs", "roof us", "us", "writes"),
    )
    for row in rows:
        table.add_row(
            str(row["step"]),
            row["kernel"],
            row["shape"],
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['weight_bytes'] / 1e6:.2f}",
            f"{row['flops'] / 1e9:.3f}",
            f"{row['seconds'] * 1e6:.2f}",
            _interval(row["modelled_seconds"]),
            " ".join(row["buffers"]),
        )
    console = _console()
    console.print(table)
    console.print(
        f"{totals['launches']} launches ({totals['launches_all']} with letterbox and NMS), "
        f"{totals['bytes'] / 1e6:.0f} MB of maps moved ({totals['unfused_bytes'] / 1e6:.0f} MB by "
        f"operations run alone), {totals['flops'] / 1e9:.1f} GFLOPs, "
        f"{totals['peak_bytes'] / 2**20:.1f} MiB of buffers, "
        f"{totals['seconds'] * 1e6:.0f} us at the ceilings of an {H200.name}; "
        f"{_interval(totals['modelled_seconds'])} us by the cost model, which no GPU has calibrated"
    )
    return {"rows": rows, "totals": totals}


def _interval(seconds: Sequence[float]) -> str:
    """Of microseconds."""
    return " to ".join(f"{1e6 * s:.{1 if s < 1e-4 else 0}f}" for s in seconds)


def _show_precision(model: YOLOv7, precision: str, size: int) -> dict[str, Any]:
    if model.form != "fused":
        raise UserError(f"--precision shows the fused form, not --form {model.form}")
    if precision not in model.ranges:
        raise UserError(
            f"no {precision} ranges in these weights: yolov7 convert --precision {precision} "
            "--calibrate FOLDER finds them"
        )
    ops, outputs = trace(model, size, size)
    ranges = model.ranges[precision]
    scales = scales_of(ops, outputs, ranges)
    rows: list[dict[str, Any]] = [
        {
            "layer": op.output.name,
            "shape": [op.output.channels, op.output.height, op.output.width],
            "reads": precision if op.inputs[0] in scales else "fp32",
            "writes": precision if op.output in scales else "fp32",
            "largest": ranges.get(op.output.name),
            "step": scales[op.output].unit if op.output in scales else None,
            "flops": 2 * op.conv.weight[0].numel() * op.output.elements,
        }
        for op in ops
        if op.conv is not None
    ]
    table = _table(
        f"{model.variant.name}, {precision}, {size} x {size}",
        ("convolution", "map", "reads", "writes", "largest", "step", "GFLOPs"),
    )
    for row in rows:
        numbers = (
            f"{row[name]:.4g}" if row[name] is not None else "" for name in ("largest", "step")
        )
        shape = " x ".join(map(str, row["shape"]))
        gflops = f"{row['flops'] / 1e9:.3f}"
        table.add_row(row["layer"], shape, row["reads"], row["writes"], *numbers, gflops)
    totals = {
        "convolutions": len(rows),
        precision: sum(row["reads"] == precision for row in rows),
        "flops": sum(row["flops"] for row in rows),
        f"{precision}_flops": sum(row["flops"] for row in rows if row["reads"] == precision),
    }
    console = _console()
    console.print(table)
    console.print(
        f"{totals[precision]} of {len(rows)} convolutions read {precision}, "
        f"{totals[f'{precision}_flops'] / totals['flops']:.1%} of the work; the head is fp32"
    )
    return {"rows": rows, "totals": totals}
