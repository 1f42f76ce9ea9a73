"""torch.export: a .pt2 with the graph of PyTorch's operators and the tensors, as plain bytes."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from yolov7.formats import pt2
from yolov7.formats.metadata import Metadata

if TYPE_CHECKING:
    from torch.export import ExportedProgram

NAME = "torch-export"
SUFFIX = ".pt2"
ABOUT = "a .pt2 for this version of PyTorch"
INSIDE: frozenset[str] = frozenset()
DEVICES: tuple[str, ...] = ("cpu", "cuda")
ENGINES: tuple[str, ...] = ()
PACKAGES: tuple[str, ...] = ()
# Ours has no pickle in it. Others' may have, PyTorch executes them, and evaluates texts besides.
TRUST = "PyTorch executes what a .pt2 file says while it loads it"
reveal = None


def write(program: "ExportedProgram", path: Path, metadata: Metadata) -> str:
    """Write the program, without its example images, which would be pickled."""
    program.example_inputs = None
    torch.export.save(program, path, extra_files=pt2.extra_files(metadata))
    return ""


def holds(path: Path) -> bool:
    """Whether a .pt2 says that it is one."""
    return pt2.read_metadata(path).kind == NAME


def open(path: Path, device: str | torch.device, engine: str) -> pt2.Session:  # noqa: A001, ARG001
    """Run it in eager PyTorch."""
    return pt2.Session(path, device, lambda file: torch.export.load(file).module())
