"""AOTInductor: a .pt2 with a library compiled for this machine's processor, or for CUDA."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from yolov7.formats.base import Forward
from yolov7.formats.metadata import Metadata
from yolov7.formats.pt2 import Pt2, extra_files

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class Aoti(Pt2):
    """A compiled program."""

    NAME = "aoti"
    ABOUT = "a .pt2 compiled for this machine"
    TRUST = "a compiled .pt2 file is a program, which runs with all your rights"

    def write(self, program: "ExportedProgram", path: Path, metadata: Metadata) -> str:
        """Compile and pack, as torch._inductor.aoti_compile_and_package does, with our metadata."""
        from torch.export.pt2_archive._package import package_pt2

        assert program.example_inputs is not None
        options: dict[str, Any] = {"aot_inductor.package": True, "freezing": True}
        with torch.no_grad():
            files = torch._inductor.aot_compile(
                program.module(), program.example_inputs[0], options=options
            )
        assert isinstance(files, list)
        package_pt2(path, aoti_files=files, extra_files=extra_files(metadata))
        return ""

    def load(self, path: Path) -> Forward:
        """The library, loaded into this process."""
        return torch._inductor.aoti_load_package(path)
