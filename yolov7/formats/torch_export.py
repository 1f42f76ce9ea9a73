"""torch.export: a .pt2 with the graph of PyTorch's operators and the tensors, as plain bytes."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch

from yolov7.formats.base import Forward
from yolov7.formats.metadata import Metadata
from yolov7.formats.pt2 import Pt2, extra_files

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class TorchExport(Pt2):
    """A program that eager PyTorch runs."""

    NAME = "torch-export"
    ABOUT = "a .pt2 for this version of PyTorch"
    # Ours has no pickle in it, but others' may have, and PyTorch evaluates texts besides.
    TRUST = "PyTorch executes what a .pt2 file says while it loads it"

    def write(self, program: "ExportedProgram", path: Path, metadata: Metadata) -> str:
        """Write the program, without its example images, which would be pickled."""
        program.example_inputs = None
        torch.export.save(program, path, extra_files=extra_files(metadata))
        return ""

    def load(self, path: Path) -> Forward:
        """The program as a module."""
        return torch.export.load(path).module()
