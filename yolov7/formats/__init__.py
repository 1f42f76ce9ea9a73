"""Formats that a model can be exported to, one module each: how a file is written and how it runs.

To add one, write a module with what `Format` lists, and name it in `FORMATS`: `yolov7 export`
offers it, checks what it writes against PyTorch, and every verb runs its files.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from yolov7.errors import UserError
from yolov7.formats import aoti, onnx, torch_export
from yolov7.formats.metadata import Metadata

if TYPE_CHECKING:
    from torch.export import ExportedProgram


class Session(Protocol):
    """A file that can be run.

    Attributes:
        engine: What runs it, such as "onnxruntime".
        device: Where its input is taken.
        text: Its metadata, see `Metadata.from_text`; of a file that is not ours, without our keys.
        shape: Of its input, None where a side is free; None: it cannot be told.
    """

    engine: str
    device: torch.device
    text: Mapping[str, str]
    shape: Sequence[int | None] | None

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs for an input on `device`."""
        ...


class Format(Protocol):
    """What a module of this package has.

    Attributes:
        NAME: For `--format` and in the metadata.
        SUFFIX: Of the file's name.
        ABOUT: In a few words, for `--help`.
        INSIDE: Of "nms" and "letterbox", what can be part of the file.
        DEVICES: What a file is made for; none: it runs anywhere.
        ENGINES: What can run it, for `--engine`, beside "auto".
        PACKAGES: That must be installed to write one.
        TRUST: Why loading one needs the user's trust; "" where it does not.
        reveal: With NMS inside, opens a file so that it suppresses above another threshold and also
            returns what it suppressed, the last output.
    """

    NAME: str
    SUFFIX: str
    ABOUT: str
    INSIDE: frozenset[str]
    DEVICES: tuple[str, ...]
    ENGINES: tuple[str, ...]
    PACKAGES: tuple[str, ...]
    TRUST: str
    reveal: Callable[[Path, float], Session] | None

    def write(self, program: "ExportedProgram", path: Path, metadata: Metadata) -> str:
        """Write the file; what else there is to know of it, such as the opset, or ""."""
        ...

    def holds(self, path: Path) -> bool:
        """Whether a file with this suffix is of this format, seen without running anything."""
        ...

    def open(self, path: Path, device: str | torch.device, engine: str) -> Session:
        """Load a file.

        Raises:
            UserError: It is damaged, or this machine has not got what runs it.
        """
        ...


FORMATS: dict[str, Format] = {module.NAME: module for module in (onnx, torch_export, aoti)}
SUFFIXES = frozenset(module.SUFFIX for module in FORMATS.values())


def format_of(path: Path) -> Format:
    """The format of a file.

    Raises:
        UserError: It is of none, or damaged.
    """
    for module in FORMATS.values():
        if path.suffix == module.SUFFIX and module.holds(path):
            return module
    raise UserError(f"{path}: not written by `yolov7 export`, or by a later version")
