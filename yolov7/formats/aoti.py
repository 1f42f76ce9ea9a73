"""AOTInductor: a .pt2 with a library compiled for this machine's processor, or for CUDA."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from yolov7.formats import pt2
from yolov7.formats.metadata import Metadata

if TYPE_CHECKING:
    from torch.export import ExportedProgram

NAME = "aoti"
SUFFIX = ".pt2"
ABOUT = "a .pt2 compiled for this machine"
INSIDE: frozenset[str] = frozenset()
DEVICES: tuple[str, ...] = ("cpu", "cuda")
ENGINES: tuple[str, ...] = ()
PACKAGES: tuple[str, ...] = ()
TRUST = "a compiled .pt2 file is a program, which runs with all your rights"
reveal = None


def write(program: "ExportedProgram", path: Path, metadata: Metadata) -> str:
    """Compile and pack, as torch._inductor.aoti_compile_and_package does without extra files."""
    from torch.export.pt2_archive._package import package_pt2

    assert program.example_inputs is not None
    options: dict[str, Any] = {"aot_inductor.package": True, "freezing": True}
    with torch.no_grad():
        files = torch._inductor.aot_compile(
            program.module(), program.example_inputs[0], options=options
        )
    assert isinstance(files, list)
    package_pt2(path, aoti_files=files, extra_files=pt2.extra_files(metadata))
    return ""


def holds(path: Path) -> bool:
    """Whether a .pt2 says that it is one."""
    return pt2.read_metadata(path).kind == NAME


def open(path: Path, device: str | torch.device, engine: str) -> pt2.Session:  # noqa: A001, ARG001
    """Run the library."""
    return pt2.Session(path, device, torch._inductor.aoti_load_package)
