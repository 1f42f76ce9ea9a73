"""What a format is: how a file is written, how it is told from others, and how it runs."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol

import torch
from torch import Tensor

from yolov7.errors import UserError
from yolov7.formats.metadata import Metadata

if TYPE_CHECKING:
    from torch.export import ExportedProgram


Forward = Callable[[Tensor], Tensor]


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


@dataclass
class Program:
    """A session of anything that can be called with images on `device`."""

    engine: str
    device: torch.device
    text: Mapping[str, str]
    forward: Forward
    shape: Sequence[int | None] | None = None

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The one output."""
        return [self.forward(x)]


class Format(ABC):
    """A format of files.

    Attributes:
        NAME: For `--format` and in the metadata.
        SUFFIX: Of the file's name.
        PART: Suffix of a second file that lies beside it; "" where there is none.
        ABOUT: In a few words, for `--help`.
        INSIDE: Of "nms" and "letterbox", what can be part of the file.
        DEVICES: What a file is made for; none: it runs anywhere.
        PRECISIONS: Of weights and convolutions, which it can have.
        ENGINES: What can run it, for `--engine`, beside "auto".
        PACKAGES: That must be installed to write one.
        EXTRA: Of this package, which brings them.
        TRUST: Why loading one needs the user's trust; "" where it does not.
    """

    NAME: ClassVar[str]
    SUFFIX: ClassVar[str]
    PART: ClassVar[str] = ""
    ABOUT: ClassVar[str]
    INSIDE: ClassVar[frozenset[str]] = frozenset()
    DEVICES: ClassVar[tuple[str, ...]] = ()
    PRECISIONS: ClassVar[tuple[str, ...]] = ("fp32", "fp16")
    ENGINES: ClassVar[tuple[str, ...]] = ()
    PACKAGES: ClassVar[tuple[str, ...]] = ()
    EXTRA: ClassVar[str] = "export"
    TRUST: ClassVar[str] = ""

    @abstractmethod
    def write(self, program: "ExportedProgram", path: Path, metadata: Metadata) -> str:
        """Write the file, metadata included; what else there is to know of it, or ""."""

    def at_opset(self, opset: int, *, plain: bool) -> "Format":  # noqa: ARG002  # for ONNX
        """The format at another version of its operators; `plain`: with nothing inside.

        Raises:
            UserError: It has no such versions, or not this one.
        """
        raise UserError(f"{self.NAME} has no opset: leave it out, or export onnx")

    @abstractmethod
    def open(self, path: Path, device: str | torch.device, engine: str) -> Session:
        """Load a file.

        Raises:
            UserError: It is damaged, or this machine has not got what runs it.
        """

    def holds(self, path: Path) -> bool:  # noqa: ARG002  # of a suffix that is its own
        """Whether a file with this suffix is of this format, seen without running anything."""
        return True

    def reveal(self, path: Path, threshold: float) -> Session:
        """With NMS inside: suppress above another threshold, and return what was suppressed last.

        The check of an export needs it, to compare the network and the suppression apart: a
        format with "nms" `INSIDE` has it, and only there is it called.
        """
        raise NotImplementedError(f"{self.NAME} has no NMS inside")
