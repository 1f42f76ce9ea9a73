"""Where images come from, frame by frame: files, videos, cameras, streams, arrays and more.

``Source`` turns any of these, or a list of them, into frames, in constant memory. Files are decoded
by threads a few images ahead of the reader. Cameras and streams are read all the time, and the
newest frame wins: a slow reader sees the present, and the frames that it missed are counted.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import count, groupby, repeat
from pathlib import Path
from threading import Condition
from time import monotonic
from typing import Literal

import cv2
from torch import Tensor

from yolov7.capture import Newest, ahead, frame_rate, next_frame, open_capture
from yolov7.errors import UserError, at_least_one
from yolov7.items import Item, find_items
from yolov7.letterbox import Image
from yolov7.text import printable

WORKERS = 2  # threads that decode images
CLOSING_S = 1.0  # for the cameras and streams, all together

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
        items: How many items the source has; 0 where only its end tells.
        kind: "image"; "video" for a frame of a file; "live" for one of a camera or stream.
        number: Frame of the video or stream, from 1; 1 for an image.
        total: Frames that a video's header promises; 0 where it says nothing.
        fps: Frames per second of a video or stream; 0 where it says nothing.
        time: Seconds since the start of the video, by its time stamps, or since the camera or
            stream was opened; 0 for an image.
    """

    pixels: Image | Tensor
    path: str
    item: int
    items: int
    kind: Literal["image", "video", "live"] = "image"
    number: int = 1
    total: int = 0
    fps: float = 0.0
    time: float = 0.0

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


class Source:
    """Frames of one source, or of a list of sources, one after the other.

    Cameras and streams come last, all at the same time.

    Args:
        source: Path, folder, glob, URL (https; s3, gs, az, hf: images, folders, globs), video,
            camera number, stream address, array ([H, W], [H, W, 1 | 3 | 4] or a batch of these;
            BGR; 8 or 16 bit), tensor ([C, H, W] or a batch;
            RGB; uint8, or floating in 0..1), PIL image (as its pixels lie, without regard to EXIF),
            bytes of an image file or a file object with them, a .txt with a source a line, a list
            of these, or what is iterated over: a generator, a DataLoader. That gives its sources
            one by one, none before its turn.
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
        at_least_one("vid_stride", vid_stride)
        if not retry >= 0:  # nor NaN
            raise UserError(f"retry is {retry:g} seconds: give 0 or more")
        self.items = find_items(source)
        self._kinds = {item.kind for item in self.items}
        if self.live:  # cameras and streams last
            self.items.sort(key=lambda item: item.kind == "live")
        self._count = 0 if "sources" in self._kinds else len(self.items)
        self.vid_stride = vid_stride
        self.retry = retry
        self.on_error = on_error
        self.on_note = on_note
        self._readers: list[tuple[int, Item, Newest]] = []
        if not self.items:
            raise UserError("the list of sources is empty: give at least one")

    def __len__(self) -> int:
        """Number of items: images, videos, cameras, streams; one for what is iterated over."""
        return len(self.items)

    @property
    def dropped(self) -> int:
        """Frames of cameras and streams that came and went while the reader was busy."""
        return sum(reader.dropped for *_, reader in self._readers)

    @property
    def live(self) -> bool:
        """Whether any item is a camera or stream."""
        return "live" in self._kinds

    def __iter__(self) -> Iterator[Frame]:
        """Frames in order, as far as they can be read."""
        numbers = count(1)
        yield from self._finite((item for item in self.items if item.kind != "live"), numbers)
        live = [item for item in self.items if item.kind == "live"]
        if live:
            yield from self._live(list(zip(numbers, live, strict=False)))

    def _finite(self, items: Iterable[Item], numbers: Iterator[int]) -> Iterator[Frame]:
        for kind, group in groupby(items, key=lambda item: item.kind):
            if kind == "image":
                yield from self._images(list(group), numbers)
                continue
            for item in group:
                if kind == "video":
                    yield from self._video(next(numbers), item)
                else:
                    yield from self._one_by_one(item, numbers)

    def _one_by_one(self, item: Item, numbers: Iterator[int]) -> Iterator[Frame]:
        for source in item.sources:
            try:
                found = find_items(source)
                if any(member.kind == "live" for member in found):
                    raise UserError(f"{found[0].name}: give cameras and streams in a list")
            except UserError as error:
                self._report(error)
                continue
            yield from self._finite(found, numbers)

    def _images(self, group: list[Item], numbers: Iterator[int]) -> Iterator[Frame]:
        loads = (partial(_attempt, item.load) for item in group if item.load)
        here = len(group) == 1 or all(item.here for item in group)
        images = (load() for load in loads) if here else ahead(loads, WORKERS)
        for item, number, image in zip(group, numbers, images, strict=False):
            if isinstance(image, UserError):
                self._report(image)
            else:
                yield Frame(image, item.name, number, self._count)

    def _video(self, number: int, item: Item) -> Iterator[Frame]:
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
                while (read := next(reads)) is not None:
                    image, time = read
                    yield Frame(
                        image, item.name, number, self._count, "video", position, total, fps, time
                    )
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

    def _live(self, group: list[tuple[int, Item]]) -> Iterator[Frame]:
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
                        image, position, time = frame
                        place = item.name, number, self._count
                        yield Frame(image, *place, "live", position, 0, reader.fps, time)
                    for said in news:
                        self._pass_on(said)
        finally:
            readers = [reader for *_, reader in self._readers]  # those that were begun
            for reader in readers:
                reader.stop()
            end = monotonic() + CLOSING_S
            for reader in readers:
                reader.join(end - monotonic())

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


def some_images(folder: Path, most: int) -> Iterator[Frame]:
    """Images of a folder, evenly from the whole, the same ones each time.

    Raises:
        UserError: There is no image, or one cannot be read.
    """
    files = [Path(item.name) for item in Source(folder).items if item.kind == "image"]
    if not files:
        raise UserError(f"{folder}: has videos only: give a folder with images")
    count = min(most, len(files))
    yield from Source([files[i * len(files) // count] for i in range(count)])


def _attempt(load: Callable[[], Image | Tensor]) -> Image | Tensor | UserError:
    try:
        return load()
    except UserError as error:
        return error
