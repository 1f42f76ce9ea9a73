"""The files that a prediction leaves behind: pictures, videos, labels, crops, JSON."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import cv2

from yolov7.atomic import atomic
from yolov7.errors import UserError
from yolov7.letterbox import Image
from yolov7.results import Results
from yolov7.text import LONGEST_NAME, file_name

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
FALLBACK_FPS = 25.0  # for cameras and containers that name no rate


@contextmanager
def text(path: Path) -> Iterator[Callable[[str], None]]:
    """What appends to a text; the file is there when the context ends without an error.

    Raises:
        UserError: It cannot be written.
    """
    with atomic(path) as temporary, temporary.open("w", encoding="utf-8") as file:

        def write(lines: str) -> None:
            try:
                file.write(lines)
            except OSError as error:
                raise UserError(f"{path}: cannot be written ({error.strerror})") from None

        yield write


@contextmanager
def json_list(path: Path) -> Iterator[Callable[[dict[str, Any]], None]]:
    """What appends a row to a JSON list; the file is there when the context ends without an error.

    Raises:
        UserError: It cannot be written.
    """
    with text(path) as append:
        separator = "[\n"

        def write(row: dict[str, Any]) -> None:
            nonlocal separator
            append(separator + json.dumps(row))
            separator = ",\n"

        yield write
        append("\n]\n" if separator == ",\n" else "[]\n")


@contextmanager
def video(path: Path, fps: float, size: tuple[int, int]) -> Iterator[Callable[[Image], None]]:
    """What appends a picture to a video; the file is there when the context ends without an error.

    Args:
        path: Of the file, ending in .mp4.
        fps: Frames per second.
        size: (width, height) in pixels; pictures of another, as cameras may send, are scaled.

    Raises:
        UserError: It cannot be written.
    """
    with atomic(path) as temporary:
        target = str(temporary)
        if any("\ud800" <= letter <= "\udfff" for letter in target):  # would end the process
            raise UserError(f"{str(path)!r}: no UTF-8, which OpenCV needs: use --nosave")
        writer = cv2.VideoWriter(target, cv2.VideoWriter.fourcc(*"mp4v"), fps, size)
        if not writer.isOpened():
            raise UserError(f"{path}: OpenCV cannot write video here: use --nosave")

        def write(picture: Image) -> None:
            fits = picture.shape[1::-1] == size
            writer.write(picture if fits else cv2.resize(picture, size))

        try:
            yield write
        finally:
            writer.release()
        if not _is_whole(temporary):
            raise UserError(f"{path}: cannot be written: is the disk full?")


def _is_whole(path: Path) -> bool:
    """Whether an MP4's boxes fill it, with the index among them: OpenCV tells of no full disk."""
    kinds, place, end = set(), 0, path.stat().st_size
    with path.open("rb") as file:
        while place < end:
            file.seek(place)
            head = file.read(16)
            size = int.from_bytes(head[:4])
            if size == 1:  # too large for four bytes
                size = int.from_bytes(head[8:])
            if size < 8:
                return False
            kinds.add(head[4:8])
            place += size
    return place == end and b"moov" in kinds


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
        mot: `tracks/NAME.txt` in MOTChallenge form, a file per video; `images.txt` for images.
    """

    folder: Path
    pictures: bool = True
    txt: bool = False
    conf: bool = False
    crop: bool = False
    coco: bool = False
    json: Path | None = None
    vid_stride: int = 1
    mot: bool = False


class Recorder:
    """Writes results as they come; a context manager.

    Files that grow are put in their place when it ends: when they are whole, if something cannot
    be written; with all that was found until then, if something else goes wrong.

    Raises:
        UserError: Something cannot be written.
    """

    def __init__(self, outputs: Outputs) -> None:
        self.outputs = outputs
        self._names: dict[int, str] = {}  # file name by item
        self._taken: dict[str, int] = {}  # the last number that a name was given
        self._numbers: dict[int, str] = {}  # the name that is this number in predictions.json
        self._files = ExitStack()
        self._open: dict[int, _Open] = {}  # by item; 0: all images
        self._sound = True
        with ExitStack() as files:  # both or none
            rows, coco = outputs.json, outputs.folder / "predictions.json"
            self._rows = files.enter_context(json_list(rows)) if rows else None
            self._coco = files.enter_context(json_list(coco)) if outputs.coco else None
            self._files = files.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.__exit__(*((None, None, None) if self._sound else (kind, error, trace)))

    def write(self, result: Results) -> None:
        """Write everything that is asked for of one image or frame."""
        try:
            self._write(result)
        except UserError:
            self._sound = False
            raise

    def _write(self, result: Results) -> None:
        frame, folder = result.frame, self.outputs.folder
        name = self._name(result)
        stem = Path(name).stem if frame.kind == "image" else f"{name}-{frame.number:06}"
        if self.outputs.pictures:
            if frame.kind == "image":
                result.save(folder / name)
            else:
                self._write_frame(result, folder / f"{name}.mp4")
        if self.outputs.mot:
            self._write_tracks(result, folder / "tracks", name)
        if self.outputs.txt:
            result.save_txt(folder / "labels" / f"{stem}.txt", conf=self.outputs.conf)
        if self.outputs.crop:
            result.save_crops(folder / "crops", stem)
        if self._coco:
            for row in result.to_coco(self._image_id(stem)):
                self._coco(row)
        if self._rows:
            self._rows(result.to_dict())

    def _image_id(self, stem: str) -> int | str:
        """The number that a file is called, as COCO's are; its name where another's is equal."""
        if not stem.isdecimal():
            return stem
        number = int(stem)
        return number if self._numbers.setdefault(number, stem) == stem else stem

    def _name(self, result: Results) -> str:
        """File name of an item: its own, numbered where two items share one."""
        frame = result.frame
        if frame.item not in self._names:
            path = Path(frame.path.split("?")[0] if "://" in frame.path else frame.path)
            stem = path.stem.replace(" ", "-") if frame.kind != "image" else path.stem
            # A local image's own name fits; those of a video's frames and of crops get numbers.
            known = frame.kind == "image" and "://" not in frame.path
            known &= not self.outputs.crop or len(os.fsencode(stem)) <= LONGEST_NAME
            stem = self._free(stem if known else file_name(stem))
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
        files = self._opened(frame.item, result)
        if files.show is None:
            fps = (frame.fps or FALLBACK_FPS) / self.outputs.vid_stride
            height, width = picture.shape[:2]
            files.show = files.stack.enter_context(video(path, fps, (width, height)))
        files.show(picture)

    def _write_tracks(self, result: Results, folder: Path, name: str) -> None:
        image = result.frame.kind == "image"
        files = self._opened(0 if image else result.frame.item, result)
        if files.note is None:
            path = folder / ("images.txt" if image else f"{name}.txt")
            files.note = files.stack.enter_context(text(path))
        files.note(result.to_mot())

    def _opened(self, item: int, result: Results) -> "_Open":
        """The files of a video or stream; videos come one after the other, streams side by side."""
        if item not in self._open:
            if result.frame.kind == "video":
                for files in self._open.values():
                    files.stack.close()
                self._open.clear()
            self._open[item] = _Open(self._files.enter_context(ExitStack()))
        return self._open[item]


@dataclass
class _Open:
    """Files that grow with a video or stream."""

    stack: ExitStack
    show: Callable[[Image], None] | None = None
    note: Callable[[str], None] | None = None
