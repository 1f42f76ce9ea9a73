"""What an exported file says of itself: read as anyone may have written it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from yolov7.errors import UserError
from yolov7.schema import from_json
from yolov7.suppression import Suppression
from yolov7.variants import LARGEST_IMGSZ

FORMAT = "yolov7-triton-export/1"
LONGEST = 1 << 20  # characters of the metadata; a thousand classes take a fiftieth of it
LARGEST_STRIDE = 64  # the family's
MOST_PIXELS = 1 << 26  # of a batch, 800 MB, which is filled up where there are fewer images

Layout = Literal["grid", "classes-first", "detections"]
Precision = Literal["fp32", "fp16", "int8"]


@dataclass(frozen=True)
class Metadata:
    """What a file says of itself: stored key by key, each value as JSON.

    Attributes:
        format: `FORMAT`; "" of a file that is not ours.
        kind: Key of `yolov7.formats.FORMATS`.
        variant: Name of the architecture.
        names: Class names by number.
        stride: The model's coarsest, pixels.
        imgsz: (height, width) of the network's input, pixels.
        batch: Images per call, or "dynamic".
        precision: Of weights and convolutions; input and output are fp32 always.
        layout: Of the output. grid [B, N, 5 + nc]: centre x, centre y, width, height, objectness,
            class probabilities. classes-first [B, 4 + nc, N]: the box, then objectness x class.
            detections [B, max_det, 6]: x1, y1, x2, y2, score, class, and counts [B].
        letterbox: The input is one uint8 [H, W, 3] BGR image of any size, and boxes are in its
            pixels; else images [B, 3, h, w] RGB in 0..1, and boxes are in pixels of these.
        nms: With the layout "detections", what is kept.
        device: Where a .pt2 runs: "cpu" or "cuda".
        version: Of this package, when it wrote the file.

    Raises:
        ValueError: Values contradict each other, or are out of range.
    """

    format: str
    kind: str
    variant: str
    names: list[str]
    stride: int
    imgsz: tuple[int, int]
    batch: int | Literal["dynamic"]
    precision: Precision
    layout: Layout
    letterbox: bool
    nms: Suppression | None
    device: Literal["cpu", "cuda"]
    version: str

    def __post_init__(self) -> None:
        if not (self.variant.isprintable() and len(self.variant) <= 100):
            raise ValueError("variant is no printable text of up to 100 letters")
        if not self.names:
            raise ValueError("names are none")
        if not all(1 <= side <= LARGEST_IMGSZ for side in self.imgsz):
            height, width = self.imgsz
            raise ValueError(f"imgsz is {height} x {width}: give 1 to {LARGEST_IMGSZ} pixels")
        if not 1 <= self.stride <= LARGEST_STRIDE:  # images are rounded up to it
            raise ValueError(f"stride is {self.stride}: give 1 to {LARGEST_STRIDE} pixels")
        if self.batch != "dynamic" and self.batch < 1:
            raise ValueError(f"batch is {self.batch}: give 1 or more")
        images = 1 if self.batch == "dynamic" else self.batch
        if images * self.imgsz[0] * self.imgsz[1] > MOST_PIXELS:
            raise ValueError(f"batch is {images}: give at most {MOST_PIXELS >> 20} million pixels")
        if (self.layout == "detections") != (self.nms is not None):
            raise ValueError(f"layout is {self.layout}, but nms is {self.nms}")

    def to_text(self) -> dict[str, str]:
        """The values as JSON."""
        return {key: json.dumps(value) for key, value in asdict(self).items()}

    @classmethod
    def from_text(cls, text: Mapping[str, str], path: Path) -> "Metadata":
        """Inverse of `to_text`.

        Raises:
            UserError: Something is missing, of another type, or of a newer format.
        """
        if missing := lacking(text):
            raise UserError(
                f"{path}: not written by `yolov7 export`: its metadata lacks {', '.join(missing)}"
            )
        try:
            stored = {field.name: text[field.name] for field in fields(cls)}
            if sum(map(len, stored.values())) > LONGEST:
                raise ValueError(f"more than {LONGEST} characters")
            values = {key: json.loads(value) for key, value in stored.items()}
            if values["format"] != FORMAT and isinstance(values["format"], str):
                raise ValueError(f"of format {values['format']!a:.40}; this version reads {FORMAT}")
            return from_json(cls, values)
        except (ValueError, TypeError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(f"{path}: its metadata is damaged: {reason}") from None


def lacking(text: Mapping[str, str]) -> list[str]:
    """Keys of `Metadata` that a text has not got."""
    return [field.name for field in fields(Metadata) if field.name not in text]
