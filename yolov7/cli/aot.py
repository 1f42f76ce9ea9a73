"""`yolov7 aot`: what the compiler makes of the kernels, for a GPU that need not be here."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from yolov7.engine.graph.workload import workload
from yolov7.errors import UserError, at_least_one
from yolov7.kernels.aot import Row, capability_of, compile_all, kernel_files, passed_limits, table
from yolov7.kernels.runtime import HAS_TRITON
from yolov7.runs import check_writable, write_json
from yolov7.variants import named


@dataclass(kw_only=True)
class Aot:
    """Compile the kernels ahead of time: registers, shared memory, matrix instructions."""

    target: Literal["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"] = "sm_90"
    """architecture of the GPU"""
    variant: str | None = None
    """model whose launches are compiled (default: a sample of layers)"""
    batch: int = 1
    """images at a time"""
    precision: Literal["fp32", "fp16", "bf16", "fp8", "int8"] = "fp16"
    """of feature maps and weights"""
    only: tuple[str, ...] = ()
    """kernel files, such as conv nms (default: all)"""
    json: Path | None = None
    """write the rows and totals to this file"""


def run(options: Aot) -> int:
    """Print a row for each kernel; 1 when one passes a limit."""
    if options.variant is not None:
        named(options.variant)
    at_least_one("batch", options.batch)
    if options.precision == "fp8" and capability_of(options.target) < (8, 9):
        raise UserError(f"{options.target} has no fp8; use sm_89 or later")
    files = kernel_files()
    if unknown := sorted(set(options.only) - files.keys()):
        raise UserError(f"no kernels {' '.join(unknown)}: there are {' '.join(files)}")
    if not HAS_TRITON:
        raise UserError("compiling kernels needs Triton: pip install triton")
    check_writable(options.json)
    print(
        f"{'kernel':22} {'shape':48} {'regs':>4} {'shared':>7} {'local':>5} {'matrix':18} "
        f"{'tma':>3} {'instr':>6}  config"
    )
    rows, over = [], []
    known = workload(options.variant, options.batch, options.precision)
    for row in compile_all(options.target, known, only=options.only):
        _print_row(row)
        rows.append(row)
        over += [f"{row.kernel} {row.shape}: {limit}" for limit in passed_limits(row)]
    write_json(options.json, table(rows))
    for line in over:
        print(f"over the limit: {line}", file=sys.stderr)
    return 1 if over else 0


def _print_row(row: Row) -> None:
    operand = f" {row.mma_operand}" if row.mma_operand else ""
    mma = f"{row.mma_count} {row.mma}{operand}" if row.mma else "-"
    print(
        f"{row.kernel:22} {row.shape:48} {row.registers:4} {row.shared_bytes:7} "
        f"{row.local_bytes:5} {mma:18} {row.tma_loads:3} {row.instructions:6}  {row.config}"
    )
