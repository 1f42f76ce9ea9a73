"""What the two kinds of .pt2 share: the archive of PyTorch, with our metadata among its files."""

import json
import zipfile
from abc import abstractmethod
from pathlib import Path

import torch

from yolov7.device import resolve_device
from yolov7.errors import UserError, first_line
from yolov7.formats.base import Format, Forward, Program, Session
from yolov7.formats.metadata import LONGEST, Metadata
from yolov7.text import one_line

ENTRY = "yolov7.json"  # of the metadata among the archive's extra files


def extra_files(metadata: Metadata) -> dict[str, str]:
    """The metadata, as PyTorch packs it."""
    return {ENTRY: json.dumps(metadata.to_text())}


def read_metadata(path: Path) -> Metadata:
    """Metadata of a .pt2, read without loading anything of it.

    Raises:
        UserError: The file is damaged, or not ours.
    """
    text: object = {}
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [n for n in archive.namelist() if n.endswith(f"/extra/{ENTRY}")]
            if entries:
                with archive.open(entries[0]) as file:  # which may inflate to gigabytes
                    content = file.read(2 * LONGEST)
                text = json.loads(content)
    except Exception as error:  # cut, encrypted, packed in an unknown way, nested too deeply
        raise unreadable(str(path), "a .pt2 file", error) from None
    if not isinstance(text, dict) or not all(isinstance(value, str) for value in text.values()):
        raise UserError(f"{path}: its metadata is damaged: it is no table of texts")
    return Metadata.from_text(text, path)


class Pt2(Format):
    """A program in an archive of PyTorch."""

    SUFFIX = ".pt2"
    DEVICES = ("cpu", "cuda")

    @abstractmethod
    def load(self, path: Path) -> Forward:
        """What can be called of a file."""

    def holds(self, path: Path) -> bool:
        """Whether the metadata say that it is one."""
        return read_metadata(path).kind == self.NAME

    def open(self, path: Path, device: str | torch.device, engine: str) -> Session:  # noqa: ARG002
        """Load a file on the device that it was made for."""
        metadata = read_metadata(path)
        chosen = device_of(path, metadata, device)
        try:
            return Program(self.NAME, chosen, metadata.to_text(), self.load(path))
        except Exception as error:  # damage shows in many ways
            raise unreadable(str(path), "a .pt2 file that this PyTorch reads", error) from None


def device_of(path: Path, metadata: Metadata, wanted: str | torch.device) -> torch.device:
    """Where a file runs: on CUDA it is the first GPU.

    Raises:
        UserError: It was exported for another device, or there is none.
    """
    device = torch.device(metadata.device)
    chosen = device if wanted == "auto" else resolve_device(wanted)
    if chosen.type != device.type:
        raise UserError(f"{path}: was exported for {device}: export it with --device {chosen.type}")
    if chosen.index:
        raise UserError(f"{path}: runs on the first GPU: choose it with CUDA_VISIBLE_DEVICES")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{path}: was exported for cuda, and there is no GPU here")
    return device


def unreadable(name: str, what: str, error: Exception) -> UserError:
    """The error of a file that cannot be loaded, with the first line of the reason."""
    reason = first_line(error)
    return UserError(f"{name}: truncated, or not {what} ({one_line(reason)[:120]})")
