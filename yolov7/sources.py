"""Where images come from: files, folders, globs, URLs, videos, cameras, streams, arrays, tensors.

``Source`` turns any of these, or a list of them, into frames, in constant memory. Files are decoded
by threads a few images ahead of the reader. Cameras and streams are read all the time, and the
newest frame wins: a slow reader sees the present, and the frames that it missed are counted.
"""

import glob
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import groupby, repeat
from pathlib import Path
from threading import Condition
from typing import Literal
from urllib.parse import urlsplit

import cv2
import numpy as np
import torch
from torch import Tensor

from yolov7.capture import Newest, ahead, frame_rate, next_frame, open_capture
from yolov7.errors import UserError
from yolov7.fetch import REFUSALS, fetch, open_url, unreachable
from yolov7.images import IMAGE_SUFFIXES, decode_image, read_image, to_bgr
from yolov7.letterbox import Image
from yolov7.text import printable, without_secrets

VIDEO_SUFFIXES = frozenset(
    {".3gp", ".asf", ".avi", ".flv", ".gif", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg"}
    | {".ogv", ".ts", ".webm", ".wmv"}
)
STREAM_SCHEMES = frozenset({"rtsp", "rtsps", "rtmp", "rtp", "udp", "tcp", "srt"})

SLACK = 0.01  # by which resizing may carry the values of a tensor beyond 1
WORKERS = 2  # threads that decode images

NO_VIDEO = "not a video that can be read: check the file"
NO_STREAM = "cannot be opened: check that it is there"

OnError = Callable[[UserError], None]


@dataclass(frozen=True)
class Frame:
    """One image and where it comes from.

    Attributes:
        pixels: [H, W, 3] uint8, BGR; a tensor if the image was given as one on a GPU.
        path: File, URL, "camera 0", "array 0" and the like.
        item: Which of the source's items this is, from 1.
        items: How many items the source has.
        kind: "image"; "video" for a frame of a file; "live" for one of a camera or stream.
        number: Frame of the video or stream, from 1; 1 for an image.
        total: Frames that a video's header promises; 0 where it says nothing.
        fps: Frames per second of a video or stream; 0 where it says nothing.
    """

    pixels: Image | Tensor
    path: str
    item: int
    items: int
    kind: Literal["image", "video", "live"] = "image"
    number: int = 1
    total: int = 0
    fps: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        height, width, _ = self.pixels.shape
        return int(height), int(width)

    @property
    def image(self) -> Image:
        """The pixels in memory; those on a GPU are fetched each time."""
        pixels = self.pixels
        return pixels.cpu().numpy() if isinstance(pixels, Tensor) else pixels


@dataclass(frozen=True)
class _Item:
    name: str
    kind: Literal["image", "video", "live"]
    load: Callable[[], Image | Tensor] | None = None  # images
    here: bool = False  # nothing is waited for: an array or tensor
    target: str | int = ""  # what OpenCV opens: videos, cameras, streams


class Source:
    """Frames of one source, or of a list of sources, one after the other.

    Cameras and streams come last, all at the same time.

    Args:
        source: Path, folder, glob, URL, video, camera number, stream address, array ([H, W],
            [H, W, 1 | 3 | 4] or a batch of these; BGR; 8 or 16 bit), tensor ([C, H, W] or a batch;
            RGB; uint8, or floating in 0..1), or a list of these.
        vid_stride: Take every n-th frame of a video or stream.
        retry: Seconds for which a camera or stream that has dropped is tried again.
        on_error: Called with the error of an item that cannot be read, or of a camera or stream
            that has ended; the others follow. Without it the error is raised.
        on_note: Called with a line when a camera or stream has dropped and is tried again.

    Raises:
        UserError: An item cannot be read, and there is no ``on_error``.
    """

    def __init__(
        self,
        source: object,
        *,
        vid_stride: int = 1,
        retry: float = 0.0,
        on_error: OnError | None = None,
        on_note: Callable[[str], None] | None = None,
    ) -> None:
        if vid_stride < 1:
            raise UserError(f"vid_stride is {vid_stride}: give 1 or more")
        if not retry >= 0:  # nor NaN
            raise UserError(f"retry is {retry:g} seconds: give 0 or more")
        self.items = list(_items(source))
        self.vid_stride = vid_stride
        self.retry = retry
        self.on_error = on_error
        self.on_note = on_note
        self._readers: list[tuple[int, _Item, Newest]] = []
        if not self.items:
            raise UserError("the list of sources is empty: give at least one")

    def __len__(self) -> int:
        """Number of items: images, videos, cameras, streams."""
        return len(self.items)

    @property
    def dropped(self) -> int:
        """Frames of cameras and streams that came and went while the reader was busy."""
        return sum(reader.dropped for *_, reader in self._readers)

    @property
    def live(self) -> bool:
        """Whether any item is a camera or stream."""
        return any(item.kind == "live" for item in self.items)

    def __iter__(self) -> Iterator[Frame]:
        """Frames in order, as far as they can be read."""
        numbered = list(enumerate(self.items, 1))
        finite = [(number, item) for number, item in numbered if item.kind != "live"]
        for kind, group in groupby(finite, key=lambda pair: pair[1].kind):
            if kind == "image":
                yield from self._images(list(group))
            else:
                for number, item in group:
                    yield from self._video(number, item)
        live = [(number, item) for number, item in numbered if item.kind == "live"]
        if live:
            yield from self._live(live)

    def _images(self, group: list[tuple[int, _Item]]) -> Iterator[Frame]:
        loads = (partial(_attempt, item.load) for _, item in group if item.load)
        here = all(item.here for _, item in group)
        images = (load() for load in loads) if here else ahead(loads, WORKERS)
        for (number, item), image in zip(group, images, strict=True):
            if isinstance(image, UserError):
                self._report(image)
            else:
                yield Frame(image, item.name, number, len(self))

    def _video(self, number: int, item: _Item) -> Iterator[Frame]:
        try:
            capture = open_capture(item.target, item.name, NO_VIDEO)
        except UserError as error:
            self._report(error)
            return
        total, fps = max(int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0), frame_rate(capture)
        position = 1
        reads = ahead(repeat(partial(next_frame, capture, self.vid_stride)), workers=1)
        # The header's count is a promise only: the end is where no frame comes any more.
        with closing(reads):
            try:
                while (image := next(reads)) is not None:
                    yield Frame(image, item.name, number, len(self), "video", position, total, fps)
                    position += self.vid_stride
            except UserError as error:
                self._report(UserError(f"{item.name}: {error} from frame {position} on"))
                position = 0
        codec = int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True)
        capture.release()
        if position == 1:
            kind = printable(codec.decode("latin-1")).strip() or "an unknown codec"
            line = (
                f"holds no frame that can be read: check the file, or convert it ({kind}) to H.264"
            )
            self._report(UserError(f"{item.name}: {line}"))

    def _live(self, group: list[tuple[int, _Item]]) -> Iterator[Frame]:
        changed = Condition()
        self._readers = []
        try:
            for number, item in group:
                connect = partial(open_capture, item.target, item.name, NO_STREAM)
                reader = Newest(
                    item.name, connect, stride=self.vid_stride, retry=self.retry, changed=changed
                )
                self._readers.append((number, item, reader))
            readers = [reader for *_, reader in self._readers]
            while True:
                with changed:
                    changed.wait_for(
                        lambda: (
                            all(r.ended for r in readers) or any(r.frame or r.news for r in readers)
                        )
                    )
                    taken = [reader.take() for reader in readers]
                if not any(frame or news for frame, news in taken):
                    return
                for (number, item, reader), (frame, news) in zip(self._readers, taken, strict=True):
                    if frame:
                        image, count = frame
                        yield Frame(
                            image, item.name, number, len(self), "live", count, 0, reader.fps
                        )
                    for said in news:
                        self._pass_on(said)
        finally:
            for *_, reader in self._readers:
                reader.stop()

    def _pass_on(self, news: str | Exception) -> None:
        if isinstance(news, UserError):
            self._report(news)
        elif isinstance(news, Exception):
            raise news
        elif self.on_note is not None:
            self.on_note(news)

    def _report(self, error: UserError) -> None:
        if self.on_error is None:
            raise error
        self.on_error(error)


def _items(source: object) -> Iterator[_Item]:
    """The items that a source, or a list of them, stands for."""
    if isinstance(source, (list, tuple)):
        for member in source:
            yield from _items(member)
    elif isinstance(source, np.ndarray):
        batch = source if source.ndim == 4 else [source]
        for index, array in enumerate(batch):
            name = f"array {index}"
            yield _Item(name, "image", partial(to_bgr, array, name), here=True)
    elif isinstance(source, Tensor):
        for index, tensor in enumerate(source if source.ndim == 4 else [source]):
            name = f"tensor {index}"
            yield _Item(name, "image", partial(_from_tensor, tensor, name), here=True)
    elif isinstance(source, bool) or not isinstance(source, (int, str, Path)):
        kind = type(source).__name__  # PIL images, too: RGB or BGR would be a guess
        raise UserError(f"a source cannot be a {kind}: give a path, URL, array, tensor or a list")
    elif source == "":
        raise UserError("the source is empty: name a file, a folder, a camera or a stream")
    elif isinstance(source, int) or (
        isinstance(source, str) and source.isdecimal() and not os.path.exists(source)
    ):
        yield _Item(f"camera {source}", "live", target=int(source))
    elif "://" in str(source):
        yield _from_url(str(source))
    else:
        yield from _from_path(Path(source))


def _is_camera(source: str | Path) -> bool:
    """Whether a text is the number of a camera: no file or folder is called so."""
    return isinstance(source, str) and source.isdecimal() and not os.path.exists(source)


def _from_tensor(tensor: Tensor, name: str) -> Image | Tensor:
    if _stays(tensor):
        return tensor.detach().flip(0).movedim(0, 2).contiguous()
    pixels = tensor.detach().cpu()
    if pixels.is_floating_point():
        pixels = pixels.float().nan_to_num()
        if pixels.numel() and (largest := pixels.max().item()) > 1 + SLACK:
            raise UserError(f"{name}: values up to {largest:g}: give 0 to 1, or uint8 for 0 to 255")
        pixels = pixels.clamp(0, 1).mul(255).round().to(torch.uint8)
    if pixels.ndim == 3:
        pixels = pixels.movedim(0, 2)
        if pixels.shape[2] in (3, 4):
            pixels = pixels[:, :, [2, 1, 0]]
    return to_bgr(pixels.numpy(), name)


def _stays(tensor: Tensor) -> bool:
    """Whether a tensor stays on its GPU: the kernels take it as it is."""
    return tensor.is_cuda and tensor.dtype == torch.uint8 and tensor.ndim == 3 and len(tensor) == 3


def _from_path(path: Path) -> Iterator[_Item]:
    name = str(path)
    try:
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in _SUFFIXES)
            missing = "a folder without images or videos: give another, or one of its parts"
        elif not path.exists() and any(letter in name for letter in "*?["):
            matches = (Path(match) for match in glob.glob(name, recursive=True))
            found = sorted(p for p in matches if p.suffix.lower() in _SUFFIXES)
            missing = "matches no image or video: check the pattern"
        else:
            found, missing = [path], ""
    except (OSError, ValueError) as error:  # a folder that may not be read, a name too long, a NUL
        found, missing = [], f"cannot be read: {getattr(error, 'strerror', None) or error}"
    for file in found:
        if file.suffix.lower() in VIDEO_SUFFIXES and os.path.isfile(file):
            yield _Item(str(file), "video", target=str(file))
        else:
            yield _Item(str(file), "image", partial(read_image, file))
    if not found:
        yield _failing(name, UserError(f"{name}: {missing}"))


_SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES


def _from_url(address: str) -> _Item:
    name = without_secrets(address)
    try:
        parts = urlsplit(address)
    except ValueError as error:
        return _failing(name, unreachable(name, error))
    suffix = Path(parts.path).suffix.lower()
    if parts.scheme in STREAM_SCHEMES:
        return _Item(name, "live", target=address)
    if parts.scheme not in ("http", "https"):
        known = ", ".join(sorted(STREAM_SCHEMES | {"http", "https"}))
        return _failing(name, UserError(f"{name}: give one of {known}"))
    if suffix in VIDEO_SUFFIXES:
        return _Item(name, "video", target=address)
    if suffix in IMAGE_SUFFIXES:
        return _Item(name, "image", partial(_download_image, address, name))
    try:  # the name does not tell: the server does
        with open_url(address) as answer:
            kind = answer.headers.get_content_maintype()
    except REFUSALS as error:
        return _failing(name, unreachable(name, error))
    if kind == "image":
        return _Item(name, "image", partial(_download_image, address, name))
    return _Item(name, "video" if kind == "video" else "live", target=address)


def _download_image(address: str, name: str) -> Image:
    return decode_image(fetch(address), name)


def _failing(name: str, error: UserError) -> _Item:
    """An item that is reported when its turn comes."""
    return _Item(name, "image", partial(_fail, error))


def _fail(error: UserError) -> Image:
    raise error


def _attempt(load: Callable[[], Image | Tensor]) -> Image | Tensor | UserError:
    try:
        return load()
    except UserError as error:
        return error
