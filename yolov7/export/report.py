"""What to know of an exported file, in words."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from yolov7.export.check import Check
from yolov7.formats import FORMATS
from yolov7.formats.metadata import Metadata


@dataclass(frozen=True)
class Port:
    """An input or output of a file."""

    name: str
    type: str
    shape: tuple[int | str, ...]
    meaning: str  # of its values, with units and ranges


@dataclass(frozen=True)
class Exported:
    """A file that was written and checked.

    Attributes:
        path: Of the file.
        metadata: What is stored in it.
        size: Bytes.
        note: What else there is to know of the file, such as its opset, or "".
        check: How far its results are from PyTorch's.
        seconds: That exporting took, the check included.
    """

    path: Path
    metadata: Metadata
    size: int
    note: str
    check: Check
    seconds: float

    @property
    def command(self) -> str:
        """A command that runs the file on the sample images."""
        trust = " --trust" if FORMATS[self.metadata.kind].TRUST else ""
        return f"yolov7 predict --weights {shlex.quote(str(self.path))}{trust}"

    def __str__(self) -> str:
        """Kind, size, inputs, outputs, classes, check and command, a line each."""
        meta, found = self.metadata, self.check
        note = self.note and f", {self.note}"
        names = ", ".join(meta.names[:5]) + (", ..." if len(meta.names) > 5 else "")
        agreed = "" if found.detections is None else f", {found.detections} detections the same"
        height, width = meta.imgsz
        lines = [
            f"{self.path}: {meta.variant}, {meta.kind}, {meta.precision}, {height} x {width}, "
            f"{self.size / 2**20:.1f} MiB{note}, exported in {self.seconds:.1f} s"
        ]
        lines += [f"  input   {_line(port)}" for port in [input_port(meta)]]
        lines += [f"  output  {_line(port)}" for port in output_ports(meta)]
        lines.append(f"  classes {len(meta.names)}: {names}")
        if meta.nms is not None:
            lines.append(
                f"  NMS     confidence over {meta.nms.conf}, IoU up to {meta.nms.iou}, "
                f"at most {meta.nms.max_det} detections per image"
            )
        like = "" if meta.precision == "int8" else " equal to PyTorch"
        alike = "" if found.ap is None else f", AP {found.ap:.3f} with fp32's detections as labels"
        lines.append(
            f"  check   on {found.images} images{like}: relative RMS of boxes "
            f"{found.boxes:.1e}, of scores {found.scores:.1e}{agreed}{alike}"
        )
        return "\n".join([*lines, f"run it: {self.command}"])


def _line(port: Port) -> str:
    shape = ", ".join(map(str, port.shape))
    return f"{port.name}: {port.type} [{shape}], {port.meaning}"


def input_port(metadata: Metadata) -> Port:
    """The input of a file."""
    if metadata.letterbox:
        return Port("image", "uint8", ("height", "width", 3), "BGR, 0 to 255, of any size")
    height, width = metadata.imgsz
    shape = (_batch(metadata), 3, height, width)
    return Port("images", "float32", shape, "RGB, 0 to 1, letterboxed with grey 114 / 255")


def output_ports(metadata: Metadata) -> list[Port]:
    """The outputs of a file, in order."""
    height, width = metadata.imgsz
    strides = [8 << level for level in range(metadata.stride.bit_length() - 3)]
    count = sum(3 * (height // stride) * (width // stride) for stride in strides)
    classes, batch = len(metadata.names), _batch(metadata)
    pixels = "in pixels of the image" if metadata.letterbox else f"in pixels of {width} x {height}"
    box = f"centre x, centre y, width, height {pixels}"
    if metadata.nms is not None:
        rows = f"x1, y1, x2, y2 {pixels}, score 0 to 1 (the best first), class 0 to {classes - 1}"
        return [
            Port("detections", "float32", (batch, metadata.nms.max_det, 6), rows),
            Port(
                "counts",
                "int32",
                (batch,),
                f"rows that are detections, 0 to {metadata.nms.max_det}",
            ),
        ]
    if metadata.layout == "grid":
        meaning = f"{box}, objectness 0 to 1, {classes} class probabilities 0 to 1"
        return [Port("predictions", "float32", (batch, count, 5 + classes), meaning)]
    meaning = f"{box}, {classes} scores 0 to 1 (objectness x class)"
    return [Port("predictions", "float32", (batch, 4 + classes, count), meaning)]


def _batch(metadata: Metadata) -> int | str:
    return "batch" if metadata.batch == "dynamic" else metadata.batch
