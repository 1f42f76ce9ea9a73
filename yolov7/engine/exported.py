"""Running what `yolov7 export` wrote: a file of another runtime in the place of a `Network`.

Every file carries its description, `Metadata`; whatever the file's outputs look like, the network
made of it takes and returns what the model itself does.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from yolov7.errors import UserError
from yolov7.formats import Session, format_of
from yolov7.formats.metadata import Metadata, lacking
from yolov7.text import one_line, printable


class ExportedNetwork:
    """Decoded predictions of an exported file.

    Args:
        path: Of the file.
        device: "auto", "cpu", "cuda", "cuda:N"; a .pt2 runs where it was exported for, on CUDA
            on the first GPU, and OpenVINO on a CPU.
        engine: "auto", or "openvino" for an .onnx or .xml file.
        names: Class names of an ONNX file that is not ours.
        layout: Its output's layout, "grid" or "classes-first".
        trust: Load a file of a format that may execute anything, as both kinds of .pt2 do.

    Attributes:
        metadata: What the file says of itself.
        names: Class names by number.
        stride: The model's, pixels.
        imgsz: (height, width) of its input, pixels; it takes no other.
        device: Where the input is taken.
        dtype: Of the input.
        precision: Of weights and convolutions, "fp32" or "fp16".
        engine: "onnxruntime", "onnxruntime-cuda", "openvino", "torch-export" or "aoti".
        title: Variant and kind, in words.
        one_shape: True: the size of the input is fixed.

    Raises:
        UserError: The file is missing, damaged, not ours or not trusted, what runs it is not
            installed, or the device is not to be had.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        engine: str = "auto",
        names: Sequence[str] | None = None,
        layout: str | None = None,
        trust: bool = False,
    ) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file: check the path")
        kind = format_of(path)
        if engine not in ("auto", *kind.ENGINES):
            fitting = " or ".join(("auto", *kind.ENGINES))
            raise UserError(f"engine {engine} does not run {kind.SUFFIX} files: use {fitting}")
        if kind.TRUST and not trust:
            raise UserError(f"{path}: {kind.TRUST}: if you trust who made it, add --trust")
        self._path = path
        self._session = kind.open(path, device, engine)
        self.metadata = _metadata(self._session, path, names, layout)
        self.device, self.dtype = self._session.device, torch.float32
        self.names, self.stride = self.metadata.names, self.metadata.stride
        self.imgsz, self.one_shape = self.metadata.imgsz, True
        self.precision: str = self.metadata.precision
        self.title = printable(f"{self.metadata.variant}, exported as {self.metadata.kind}")
        self.engine = self._session.engine

    def check_wishes(
        self, *, variant: str | None, precision: str, imgsz: int | tuple[int, int] | None
    ) -> None:
        """Refuse, with a UserError, what was decided when the file was exported."""
        height, width = self.imgsz
        meta = self.metadata
        if variant is not None:
            raise UserError(f"{self._path}: is a {meta.variant}: leave the variant out")
        if precision not in ("auto", meta.precision):
            raise UserError(f"{self._path}: is {meta.precision}: export it with {precision}")
        if imgsz is not None and imgsz != (height, width) and (imgsz, imgsz) != (height, width):
            raise UserError(
                f"{self._path}: takes {height} x {width} pixels only: leave imgsz out, or "
                "export it again"
            )

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """Decoded boxes [B, N, 5 + classes] in fp32 of images x [B, 3, H, W], RGB in 0..1.

        From a file that suppresses by itself, N is its `max_det`, with rows of zeros beyond those
        that it found; suppressing these again changes nothing.
        """
        if tuple(x.shape[2:]) != self.imgsz:
            height, width = self.imgsz
            raise UserError(f"{self._path}: takes images of {height} x {width} pixels only")
        meta = self.metadata
        x = x.to(self.device, self.dtype)
        if meta.letterbox:
            pixels = (x * 255).round().to(torch.uint8).flip(1).permute(0, 2, 3, 1)
            return torch.cat([self._decoded(image.contiguous()) for image in pixels])
        if meta.batch == "dynamic":
            return self._decoded(x.contiguous())
        decoded = []
        for part in torch.split(x, meta.batch):
            full = part.contiguous()
            if len(part) < meta.batch:
                full = part.new_zeros(meta.batch, *part.shape[1:])
                full[: len(part)] = part
            decoded.append(self._decoded(full)[: len(part)])
        return torch.cat(decoded)

    def _decoded(self, x: Tensor) -> Tensor:
        """The first output for an input, in the layout "grid"."""
        try:
            output = self._session(x)[0].float()
        except Exception as error:  # every runtime has its own
            raise UserError(f"{self._path}: cannot be run ({one_line(error)})") from None
        classes, layout = len(self.names), self.metadata.layout
        width = {"grid": 5 + classes, "classes-first": 4 + classes, "detections": 6}[layout]
        axis = 1 if layout == "classes-first" else 2
        if output.ndim != 3 or output.shape[axis] != width:
            raise UserError(
                f"{self._path}: its output {list(output.shape)} is not of layout {layout} "
                f"with {classes} classes: give the right --layout and --names"
            )
        if layout == "grid":
            return output
        if layout == "classes-first":
            output = output.transpose(1, 2)
            return _grid(output[..., :4], output[..., 4:])
        corners, label = output[..., :4], output[..., 5]
        if not ((label >= 0) & (label < classes)).all():  # NaN, too
            raise UserError(f"{self._path}: finds classes that it has not: export it again")
        scores = torch.nn.functional.one_hot(label.long(), classes) * output[..., 4:5]
        size = corners[..., 2:] - corners[..., :2]
        return _grid(torch.cat((corners[..., :2] + size / 2, size), -1), scores)


def _grid(boxes: Tensor, scores: Tensor) -> Tensor:
    """[B, N, 5 + nc] of boxes and scores [B, N, nc] = objectness x class."""
    objectness = scores.amax(-1, keepdim=True)
    # With one class the score is the objectness alone; with more, classes share a whole one.
    one = torch.ones_like(objectness)
    parts = (objectness, one) if scores.shape[-1] == 1 else (one, scores)
    return torch.cat((boxes, *parts), -1)


def _metadata(
    session: Session, path: Path, names: Sequence[str] | None, layout: str | None
) -> Metadata:
    """What the file says of itself, or the user of one that is not ours."""
    text, shape = session.text, session.shape
    if "format" in text:
        if names or layout:
            raise UserError(f"{path}: knows its names and layout: leave --names and --layout out")
        metadata = Metadata.from_text(text, path)
        fits = shape is None or metadata.letterbox or tuple(shape[2:]) == metadata.imgsz
        if not fits:
            raise UserError(f"{path}: its metadata is damaged: its input is not of its imgsz")
        return metadata
    if not names or not layout:
        raise UserError(
            f"{path}: not written by `yolov7 export` (its metadata lacks "
            f"{', '.join(lacking(text))}): give --names and --layout"
        )
    if layout not in ("grid", "classes-first"):
        raise UserError(f"layout {layout}: give grid or classes-first")
    if shape is None or len(shape) != 4 or None in shape[1:] or shape[1] != 3:
        sides = " x ".join("?" if side is None else str(side) for side in shape or ())
        raise UserError(f"{path}: its input is {sides}: export it with images of one fixed size")
    batch, _, height, width = shape
    assert height is not None
    assert width is not None
    try:
        return Metadata(
            format="",
            kind="onnx",
            variant="unknown",
            names=list(names),
            stride=32,
            imgsz=(height, width),
            batch="dynamic" if batch is None else batch,
            precision="fp32",
            layout="grid" if layout == "grid" else "classes-first",
            letterbox=False,
            nms=None,
            device="cpu",
            version="",
        )
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
