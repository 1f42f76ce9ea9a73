"""The files that a prediction leaves behind: pictures, videos, labels, crops, JSON."""

import json
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2

from yolov7.errors import UserError
from yolov7.letterbox import Image
from yolov7.results import Results

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FALLBACK_FPS = 25.0  # for cameras and containers that name no rate


class JsonList:
    """A JSON list in a file, written row by row."""

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w")
        except OSError as error:
            raise UserError(f"{path}: cannot be written ({error.strerror})") from None
        self._separator = "[\n"

    def write(self, row: dict[str, Any]) -> None:
        """Append a row."""
        self._file.write(self._separator + json.dumps(row))
        self._separator = ",\n"

    def close(self) -> None:
        """End the list."""
        self._file.write("\n]\n" if self._separator == ",\n" else "[]\n")
        self._file.close()


@dataclass(frozen=True)
class Outputs:
    """What to write.

    Attributes:
        folder: The run folder.
        pictures: Annotated pictures and videos.
        txt: `labels/NAME.txt` in YOLO form, a file per image or frame.
        conf: Confidences in these files, too.
        crop: Every box as a picture, `crops/CLASS/NAME-NUMBER.jpg`.
        coco: `predictions.json`, a COCO results file; the images are called as their files.
        json: Another file, with a row per image.
        vid_stride: Frames of a video per frame that comes.
    """

    folder: Path
    pictures: bool = True
    txt: bool = False
    conf: bool = False
    crop: bool = False
    coco: bool = False
    json: Path | None = None
    vid_stride: int = 1


class Recorder:
    """Writes results as they come; a context manager that closes its files.

    Raises:
        UserError: Something cannot be written.
    """

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = outputs
        self._rows = JsonList(outputs.json) if outputs.json else None
        self._coco = JsonList(outputs.folder / "predictions.json") if outputs.coco else None
        self._names: dict[int, str] = {}  # file name by item
        self._taken: dict[str, int] = {}  # the last number that a name was given
        self._videos: dict[int, tuple[cv2.VideoWriter, tuple[int, int]]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for file in (self._rows, self._coco):
            if file:
                file.close()
        self._end_videos()

    def write(self, result: Results) -> None:
        """Write everything that is asked for of one image or frame."""
        frame, folder = result.frame, self.outputs.folder
        name = self._name(result)
        stem = Path(name).stem if frame.kind == "image" else f"{name}-{frame.number:06}"
        if self.outputs.pictures:
            if frame.kind == "image":
                result.save(folder / name)
            else:
                self._write_frame(result, folder / f"{name}.mp4")
        if self.outputs.txt:
            result.save_txt(folder / "labels" / f"{stem}.txt", conf=self.outputs.conf)
        if self.outputs.crop:
            result.save_crops(folder / "crops", stem)
        if self._coco:
            for row in result.to_coco(int(stem) if stem.isdecimal() else stem):
                self._coco.write(row)
        if self._rows:
            self._rows.write(result.to_dict())

    def _name(self, result: Results) -> str:
        """File name of an item: its own, numbered where two items share one."""
        frame = result.frame
        if frame.item not in self._names:
            path = Path(frame.path.split("?")[0])
            stem = path.stem.replace(" ", "-") if frame.kind != "image" else path.stem
            stem = self._free(stem)
            suffix = path.suffix if path.suffix.lower() in PICTURE_SUFFIXES else ".jpg"
            self._names[frame.item] = stem + suffix if frame.kind == "image" else stem
        # One name per item, and images come once: only those of videos are needed again.
        return self._names.pop(frame.item) if frame.kind == "image" else self._names[frame.item]

    def _free(self, stem: str) -> str:
        """The name itself, or numbered so that no item has it yet."""
        name = stem
        while name in self._taken:
            self._taken[stem] += 1
            name = f"{stem}-{self._taken[stem]}"
        self._taken[name] = 1
        return name

    def _write_frame(self, result: Results, path: Path) -> None:
        frame, picture = result.frame, result.plot()
        height, width = picture.shape[:2]
        if frame.item not in self._videos:
            if frame.kind == "video":  # one after the other; streams are recorded side by side
                self._end_videos()
            fps = (frame.fps or FALLBACK_FPS) / self.outputs.vid_stride
            fourcc = cv2.VideoWriter.fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(path), fourcc, fps, (width, height))
            if not writer.isOpened():
                raise UserError(f"{path}: OpenCV cannot write video here: use --nosave")
            self._videos[frame.item] = writer, (width, height)
        writer, size = self._videos[frame.item]
        writer.write(picture if size == (width, height) else _fitted(picture, size))

    def _end_videos(self) -> None:
        for writer, _ in self._videos.values():
            writer.release()
        self._videos.clear()


def _fitted(picture: Image, size: tuple[int, int]) -> Image:
    """A picture in the size of its video: cameras may change theirs."""
    return cv2.resize(picture, size).astype("uint8", copy=False)
