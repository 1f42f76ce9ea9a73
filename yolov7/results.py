"""What was found in one image: boxes, and every form in which they can be had."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolov7.atomic import atomic
from yolov7.boxes import to_coco, xyxy_to_cxcywh
from yolov7.drawing import draw_boxes
from yolov7.errors import UserError
from yolov7.letterbox import Image
from yolov7.sources import Frame
from yolov7.text import counted, file_name, printable
from yolov7.window import Window

SHOWN = 1280  # pixels


@dataclass(frozen=True, eq=False, repr=False)  # tensors have no one answer to ==
class Boxes:
    """Detections of one image, the surest first.

    Iterating gives each as `Boxes` of its own; an index, slice or mask gives these.

    Attributes:
        data: [n, 6] fp32 on the CPU: x1, y1, x2, y2 (pixels of the image), confidence, class.
        shape: (height, width) of the image in pixels.
        id: [n] int64 numbers of the tracks that they belong to; None where nothing is tracked.
    """

    data: Tensor
    shape: tuple[int, int]
    id: Tensor | None = None

    def __len__(self) -> int:
        return len(self.data)

    def __iter__(self) -> Iterator["Boxes"]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int | slice | list[int] | Tensor) -> "Boxes":
        chosen = torch.arange(len(self))[index].view(-1)
        return Boxes(self.data[chosen], self.shape, None if self.id is None else self.id[chosen])

    def __repr__(self) -> str:
        """One line: `Boxes(3, confidence 0.90 to 0.50)`."""
        if not len(self):
            return "Boxes(0)"
        return f"Boxes({len(self)}, confidence {self.conf[0]:.2f} to {self.conf[-1]:.2f})"

    @property
    def xyxy(self) -> Tensor:
        """[n, 4] left, top, right, bottom in pixels."""
        return self.data[:, :4]

    @property
    def xywh(self) -> Tensor:
        """[n, 4] centre x, centre y, width, height in pixels."""
        return xyxy_to_cxcywh(self.xyxy)

    @property
    def xyxyn(self) -> Tensor:
        """[n, 4] left, top, right, bottom in 0..1 of the image's width and height."""
        return self.xyxy / self._sides

    @property
    def xywhn(self) -> Tensor:
        """[n, 4] centre x, centre y, width, height in 0..1 of the image's width and height."""
        return self.xywh / self._sides

    @property
    def conf(self) -> Tensor:
        """[n] confidence, 0..1."""
        return self.data[:, 4]

    @property
    def cls(self) -> Tensor:
        """[n] int64 class numbers."""
        return self.data[:, 5].long()

    def numpy(self) -> NDArray[np.float32]:
        """`data` as an array."""
        return self.data.numpy()

    @property
    def _sides(self) -> Tensor:
        height, width = self.shape
        return self.data.new_tensor((width, height, width, height))


@dataclass(frozen=True, eq=False, repr=False)
class Results:
    """One image and what was found in it.

    Attributes:
        frame: The image and where it comes from.
        boxes: The detections.
        names: Class names by number.
        speed: Milliseconds spent on this image by stage: "pre" (letterbox, copy), "network", "nms".
        input_shape: (height, width) in which the network saw the whole image, beside any tiles.
        overflow: Candidates beyond what the suppression looks at, the least sure ones.
    """

    frame: Frame
    boxes: Boxes
    names: list[str]
    speed: dict[str, float]
    input_shape: tuple[int, int]
    overflow: int = 0

    masks = None
    """None, always: `supervision.Detections.from_ultralytics` asks for it."""

    def __len__(self) -> int:
        return len(self.boxes)

    def __repr__(self) -> str:
        """One line: `Results('bus.jpg', 4 persons, 1 bus)`."""
        return printable(f"Results({self.path!r}, {self.summary()})")

    def __str__(self) -> str:
        """One line: `image 3/12 bus.jpg: 448x640 4 persons, 1 bus, 6.1 ms`."""
        frame = self.frame
        number = f"{frame.item}/{frame.items}" if frame.items else f"{frame.item}"
        if frame.kind != "image":
            number += f" frame {frame.number}" + (f"/{frame.total}" if frame.total else "")
        height, width = self.input_shape
        return printable(
            f"{'image' if frame.kind == 'image' else 'video'} {number} {frame.path}: "
            f"{height}x{width} {self.summary()}, {sum(self.speed.values()):.1f} ms"
        )

    @property
    def path(self) -> str:
        """File, URL, "camera 0", "array 0" and the like."""
        return self.frame.path

    @property
    def image(self) -> Image:
        """[H, W, 3] uint8 BGR, as it was read."""
        return self.frame.image

    def summary(self) -> str:
        """How many of what, by class number: `4 persons, 1 bus`."""
        counts = sorted(Counter(self.boxes.cls.tolist()).items())
        found = [counted(n, self.names[cls]) for cls, n in counts]
        return ", ".join(found) or "no detections"

    def plot(self, *, conf: bool = True) -> Image:
        """A copy of the image with boxes and labels, the surest on top; ``conf``: how sure, too.

        What is tracked has its number in the label, and a colour by it.
        """
        boxes = self.boxes
        classes = boxes.cls.tolist()
        numbers = None if boxes.id is None else boxes.id.tolist()
        labels = [self.names[cls] for cls in classes]
        if numbers is not None:
            labels = [f"{label} {number}" for label, number in zip(labels, numbers, strict=True)]
        if conf:
            scores = zip(labels, boxes.conf.tolist(), strict=True)
            labels = [f"{label} {score:.2f}" for label, score in scores]
        return draw_boxes(self.image, boxes.xyxy.numpy(), labels, numbers or classes)

    def show(self) -> None:
        """Show the annotated image in a window until a key is pressed or it is closed.

        Raises:
            UserError: There is no display.
        """
        window, picture = Window(self.path), self.plot()
        while window.show(picture, wait=100) is None:
            pass
        window.close()

    def _repr_png_(self) -> bytes:
        """The annotated image, as a notebook shows it: its longer side has at most 1280 pixels."""
        picture = self.plot()
        ratio = SHOWN / max(picture.shape[:2])
        if ratio < 1:
            size = [max(round(side * ratio), 1) for side in picture.shape[1::-1]]
            picture = np.asarray(cv2.resize(picture, size, interpolation=cv2.INTER_AREA), np.uint8)
        return cv2.imencode(".png", picture)[1].tobytes()

    def save(self, path: str | Path, *, conf: bool = True) -> Path:
        """Write the annotated image; the suffix decides the format.

        Raises:
            UserError: It cannot be written, or OpenCV has not this format.
        """
        return write_image(path, self.plot(conf=conf))

    def save_txt(self, path: str | Path, *, conf: bool = False) -> Path:
        """Write a YOLO label file: `class cx cy w h [confidence]`, a box a line, in 0..1.

        Nothing found is an empty file.

        Raises:
            UserError: It cannot be written.
        """
        centres = self.boxes.xywhn.tolist()
        rows = zip(self.boxes.cls.tolist(), centres, self.boxes.conf.tolist(), strict=True)
        lines = [
            " ".join([str(cls), *(f"{x:.6f}" for x in (*box, *([score] if conf else [])))])
            for cls, box, score in rows
        ]
        with atomic(path, durable=False) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in lines))
        return Path(path)

    def save_crops(self, folder: str | Path, stem: str) -> list[Path]:
        """Write every box as a picture of its own: `FOLDER/CLASS/STEM-NUMBER.jpg`.

        Raises:
            UserError: They cannot be written.
        """
        image = self.image  # once: each time, a frame on a GPU is copied
        height, width = image.shape[:2]
        paths = []
        rows = zip(self.boxes.xyxy.tolist(), self.boxes.cls.tolist(), strict=True)
        for index, ((x1, y1, x2, y2), cls) in enumerate(rows, 1):
            # Whole pixels that the box touches, at least one.
            left, top = min(int(x1), width - 1), min(int(y1), height - 1)
            right, bottom = max(int(np.ceil(x2)), left + 1), max(int(np.ceil(y2)), top + 1)
            target = Path(folder) / file_name(self.names[cls]) / f"{stem}-{index}.jpg"
            paths.append(write_image(target, image[top:bottom, left:right]))
        return paths

    def to_dict(self) -> dict[str, Any]:
        """For JSON: path, height, width, boxes (name, class, confidence, xyxy), speed.

        Of a video, camera or stream also frame, its number, and time, in seconds; of a tracked box
        id.
        """
        boxes = self.boxes
        rows = zip(boxes.cls.tolist(), boxes.conf.tolist(), boxes.xyxy.tolist(), strict=True)
        height, width = boxes.shape
        row: dict[str, Any] = {"path": self.path, "height": height, "width": width}
        if self.frame.kind != "image":
            row |= {"frame": self.frame.number, "time": round(self.frame.time, 3)}
        row["boxes"] = [
            {
                "name": self.names[cls],
                "class": cls,
                "confidence": round(score, 5),
                "xyxy": [round(x, 2) for x in xyxy],
            }
            for cls, score, xyxy in rows
        ]
        if boxes.id is not None:
            for box, number in zip(row["boxes"], boxes.id.tolist(), strict=True):
                box["id"] = number
        row["speed"] = {stage: round(ms, 3) for stage, ms in self.speed.items()}
        return row

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict())

    def to_df(self) -> Any:
        """As a `pandas.DataFrame`, a box a row: name, class, confidence, x1, y1, x2, y2 (pixels).

        Raises:
            UserError: The package pandas is not installed.
        """
        try:
            pandas = import_module("pandas")
        except ImportError:
            raise UserError("to_df: run `pip install pandas` first") from None
        boxes, classes = self.boxes, self.boxes.cls.numpy()
        columns = {
            "name": [self.names[cls] for cls in classes],
            "class": classes,
            "confidence": boxes.conf.numpy(),
            **dict(zip(("x1", "y1", "x2", "y2"), boxes.xyxy.numpy().T, strict=True)),
        }
        if boxes.id is not None:
            columns["id"] = boxes.id.numpy()
        return pandas.DataFrame(columns)

    def to_coco(
        self, image_id: int | str, category_ids: list[int] | None = None
    ) -> list[dict[str, Any]]:
        """Rows of a COCO results file: image_id, category_id, bbox (left, top, w, h), score.

        Args:
            image_id: What the data set calls this image.
            category_ids: The data set's category by class number; the class number itself if None.
        """
        return to_coco(self.boxes.data, image_id, category_ids)

    def to_mot(self) -> str:
        """Rows of MOTChallenge's text: frame, id, left, top, width, height, confidence, -1, -1, -1.

        The frame of an image is its number among the source's items.
        """
        boxes, frame = self.boxes, self.frame
        numbers = [-1] * len(boxes) if boxes.id is None else boxes.id.tolist()
        place = frame.item if frame.kind == "image" else frame.number
        rows = zip(numbers, boxes.xyxy.tolist(), boxes.conf.tolist(), strict=True)
        return "".join(
            f"{place},{number},{x1:.2f},{y1:.2f},{x2 - x1:.2f},{y2 - y1:.2f},{score:.5f},-1,-1,-1\n"
            for number, (x1, y1, x2, y2), score in rows
        )

    def to_supervision(self) -> Any:
        """As `supervision.Detections`, for trackers, zones and annotators.

        Raises:
            UserError: The package supervision is not installed.
        """
        try:
            supervision = import_module("supervision")
        except ImportError:
            raise UserError("to_supervision: run `pip install supervision` first") from None
        classes = self.boxes.cls.numpy()
        return supervision.Detections(
            xyxy=self.boxes.xyxy.numpy(),
            confidence=self.boxes.conf.numpy(),
            class_id=classes,
            tracker_id=None if self.boxes.id is None else self.boxes.id.numpy(),
            data={"class_name": np.array([self.names[cls] for cls in classes], dtype=str)},
        )


def write_image(path: str | Path, image: Image) -> Path:
    """Write a picture, its folder made where there is none; the suffix decides the format.

    Raises:
        UserError: It cannot be written, or OpenCV has not this format.
    """
    path = Path(path)
    try:  # OpenCV gets no path: one that is not UTF-8 would end the process
        encoded, data = cv2.imencode(path.suffix if path.suffix.isascii() else "", image)
    except cv2.error:
        encoded = False
    if not encoded:
        raise UserError(f"{path}: cannot be written in this format: use .jpg or .png")
    with atomic(path, durable=False) as temporary:
        temporary.write_bytes(data.tobytes())
    return path
