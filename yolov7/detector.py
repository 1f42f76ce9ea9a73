"""From a source of images to their boxes."""

import copy
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from yolov7.augmented import Augmented
from yolov7.engine.choose import Runtime, fit, open_frames, open_network
from yolov7.engine.eager import Network
from yolov7.engine.frames import Forward, Frames, Pending, equal_shapes
from yolov7.errors import UserError, at_least_one
from yolov7.letterbox import Geometry, letterbox_geometry
from yolov7.model import YOLOv7
from yolov7.results import Boxes, Results
from yolov7.sources import Frame, OnError, Source
from yolov7.speed import Speed
from yolov7.suppression import Suppression
from yolov7.tiling import TiledFrames

WINDOW = 4  # batches of images that are read before those of equal shape are put together
MIN_TILE = 32  # pixels; less would make hundreds of thousands of tiles


class Detector:
    """Finds objects in images.

    It can be copied and pickled: the copy is made anew from the same weights and options.

    Args:
        weights: A file (an exported one, too), the name of a published one, or a model (which is
            copied); None: the embedded demo weights (blood cells).
        variant: Of a bare state dict, where its tensors do not tell.
        device: "auto", "cpu", "cuda", "cuda:N", "N" or "mps".
        precision: "auto", "fp32", "fp16", "bf16", "fp8" or "int8"; see
            `yolov7.engine.choose.Runtime`.
        engine: "auto", "eager", "compile", "graph" or "openvino"; likewise.
        imgsz: Longer side, or (height, width), that images are scaled to, in pixels; rounded up to
            the model's stride. None: the checkpoint's.
        conf: What a box's confidence must exceed, 0..1.
        iou: Overlap with a surer box of its class above which a box is dropped, 0..1.
        max_det: Boxes per image at most.
        classes: Names or numbers of the classes to look for; None: all.
        agnostic: Boxes of different classes suppress each other too.
        batch: Images that go through the network together.
        tile: Side in pixels of overlapping tiles that are looked at beside the whole image, for
            small objects; None: none.
        overlap: Least share of a tile that its neighbour covers too.
        augment: Look at three scales, one mirrored (test-time augmentation).
        names: Class names of an ONNX file that `yolov7 export` did not write.
        layout: Of its output: "grid" or "classes-first".
        trust: Load a .pt2, which may execute anything, because you know who made it.

    Attributes:
        names: Class names by number.
        network: What runs the model.
        imgsz: (height, width) that images are scaled to.
        speed: Times of the images so far.
        startup_s: Seconds that `torch.compile` took; 0 with other engines.

    Raises:
        UserError: Something of this is not to be had.
    """

    def __init__(
        self,
        weights: str | Path | YOLOv7 | None = None,
        *,
        variant: str | None = None,
        device: str | torch.device = "auto",
        precision: str = "auto",
        engine: str = "auto",
        imgsz: int | tuple[int, int] | None = None,
        conf: float = 0.25,
        iou: float = 0.45,
        max_det: int = 300,
        classes: Sequence[int | str] | None = None,
        agnostic: bool = False,
        batch: int = 1,
        tile: int | None = None,
        overlap: float = 0.2,
        augment: bool = False,
        names: Sequence[str] | None = None,
        layout: str | None = None,
        trust: bool = False,
    ) -> None:
        if isinstance(weights, YOLOv7):
            weights = copy.deepcopy(weights)  # a copy of this detector needs it as it is now
        elif weights is not None and Path(weights).is_file():
            weights = Path(weights).absolute()  # wherever that copy is made
        self._arguments = {key: value for key, value in locals().items() if key != "self"}
        runtime = Runtime(
            weights=weights,
            variant=variant,
            device=device,
            precision=precision,
            engine=engine,
            imgsz=imgsz,
            names=names,
            layout=layout,
            trust=trust,
        )
        kept = Suppression(conf=conf, iou=iou, max_det=max_det, agnostic=agnostic)
        at_least_one("batch", batch)
        if tile is not None and tile < MIN_TILE:
            raise UserError(f"tile is {tile}: give {MIN_TILE} pixels or more")
        if not 0 <= overlap < 1:
            raise UserError(f"overlap is {overlap}: give at least 0 and less than 1")
        self.network = open_network(runtime)
        self.names, self.stride, self.batch = self.network.names, self.network.stride, batch
        self.imgsz = fit(imgsz, self.network)
        if classes is not None:
            kept = replace(kept, classes=_class_numbers(classes, self.names))
        forward: Forward = self.network
        if augment:
            if not isinstance(self.network, Network):
                raise UserError("an exported file takes one size only: leave augment out")
            forward = Augmented(self.network)
        self._kept, self._way = kept, partial(self._open_frames, forward, tile, overlap)
        self._frames = self._way(kept)
        self.speed = Speed()
        self.startup_s = 0.0
        if self.network.engine == "compile":
            start = time.perf_counter()
            forward(torch.zeros(batch, 3, *self.imgsz))
            self.startup_s = time.perf_counter() - start

    def __repr__(self) -> str:
        """Weights, classes and where it runs, in one line."""
        network = self.network
        return (
            f"Detector({network.title}, {len(self.names)} classes, {network.device}, "
            f"{network.precision}, {network.engine})"
        )

    def __reduce__(self) -> tuple[object, ...]:
        """How to make the same anew: networks hold locks, graphs and packed weights."""
        return partial(type(self), **self._arguments), ()

    def __call__(
        self, source: object, *, vid_stride: int = 1, on_error: OnError | None = None
    ) -> list[Results]:
        """Results of every image of a source, in its order, images included: see ``stream``."""
        return list(self.stream(source, vid_stride=vid_stride, on_error=on_error))

    def stream(
        self, source: object, *, vid_stride: int = 1, on_error: OnError | None = None
    ) -> Generator[Results]:
        """Results one by one, in constant memory.

        Args:
            source: What ``Source`` takes, or a ``Source``.
            vid_stride: Take every n-th frame of a video or stream.
            on_error: Called with the error of an image that cannot be read; the others are done.
                Without it the error is raised.
        """
        if not isinstance(source, Source):
            source = Source(source, vid_stride=vid_stride, on_error=on_error)
        yield from self._stream(source, self._frames)

    def track(
        self,
        source: object,
        *,
        lost: float = 1.0,
        vid_stride: int = 1,
        on_error: OnError | None = None,
    ) -> Generator[Results]:
        """Results one by one, their boxes those that belong to a track, ``boxes.id`` its number.

        Args:
            source: As of ``stream``; images that follow one another are taken as one video.
            lost: Seconds for which an object that is not seen keeps its number.
            vid_stride: Take every n-th frame of a video or stream.
            on_error: As of ``stream``.

        Raises:
            UserError: The package trackers is not installed.
        """
        from yolov7.tracking import LOW, Tracker

        tracker = Tracker(conf=self._kept.conf, lost=lost)
        if not isinstance(source, Source):
            source = Source(source, vid_stride=vid_stride, on_error=on_error)
        # Boxes that are not sure enough to begin a track may go on with one.
        frames = self._way(replace(self._kept, conf=min(self._kept.conf, LOW)))
        with closing(self._stream(source, frames)) as results:
            for result in results:
                yield tracker(result)

    def _stream(self, source: Source, way: Frames) -> Generator[Results]:
        # A camera's newest frame is worth more than a full batch, and than a busy device.
        live = source.live
        size = 1 if live or self.batch == 1 else WINDOW * self.batch
        under_way: deque[_Window] = deque()
        unread: UserError | None = None
        try:
            for window in _windows(iter(source), size):
                if isinstance(window, UserError):
                    unread = window
                    break
                under_way.append(self._submit(window, way))
                if len(under_way) > (0 if live else way.in_flight):
                    yield from self._results(under_way.popleft())
            while under_way:
                yield from self._results(under_way.popleft())
        finally:  # a stream that is closed leaves nothing under way
            for left in under_way:
                for _, pending in left.pending:
                    pending.wait()
        if unread is not None:
            raise unread

    def _open_frames(
        self, network: Forward, tile: int | None, overlap: float, kept: Suppression
    ) -> Frames:
        if tile is None:
            return open_frames(network, kept, self.batch)
        fitted = self._fit
        return TiledFrames(network, kept, self.batch, tile=tile, overlap=overlap, fit=fitted)

    def _fit(self, shape: tuple[int, int]) -> Geometry:
        """Where an image of (height, width) lies in the network's input."""
        auto = not self.network.one_shape
        return letterbox_geometry(shape, self.imgsz, stride=self.stride, auto=auto)

    def _submit(self, frames: list[Frame], way: Frames) -> "_Window":
        """Start detecting in images, those of equal letterboxed shape together."""
        where = [self._fit(frame.shape) for frame in frames]
        start = time.perf_counter()
        prepared = [
            way.prepare(frame.pixels, geometry)
            for frame, geometry in zip(frames, where, strict=True)
        ]
        pre = 1e3 * (time.perf_counter() - start) / len(frames)
        pending = [
            (chunk, way.submit([prepared[i] for i in chunk], [where[i] for i in chunk]))
            for chunk in equal_shapes([geometry.shape for geometry in where], self.batch)
        ]
        return _Window(frames, where, pre, pending)

    def _results(self, window: "_Window") -> Iterator[Results]:
        results: dict[int, Results] = {}
        for chunk, pending in window.pending:
            found = pending.wait()
            speed = {stage: ms / len(chunk) for stage, ms in found.ms.items()}
            if "pre" in speed:
                speed["pre"] += window.pre
            for index, (rows, beyond) in zip(chunk, found.rows(), strict=True):
                self.speed.add(speed)
                frame, shape = window.frames[index], window.where[index].shape
                boxes = Boxes(rows, frame.shape)
                results[index] = Results(frame, boxes, self.names, speed, shape, beyond)
        yield from [results[index] for index in range(len(window.frames))]


def _windows(frames: Iterator[Frame], size: int) -> Iterator[list[Frame] | UserError]:
    """Frames, so many at a time; an error comes after those that were read before it."""
    window: list[Frame] = []
    try:
        for frame in frames:
            window.append(frame)
            if len(window) == size:
                yield window
                window = []
    except UserError as error:
        if window:
            yield window
        yield error
        return
    if window:
        yield window


class _Window(NamedTuple):
    """Images that were submitted together."""

    frames: list[Frame]
    where: list[Geometry]
    pre: float
    """Milliseconds that preparing one took."""
    pending: list[tuple[list[int], Pending]]
    """Indices of a batch, and its detections."""


def _class_numbers(classes: Iterable[int | str], names: Sequence[str]) -> tuple[int, ...]:
    """Class numbers of names or numbers."""
    numbers = []
    for wanted in classes:
        if wanted in names:
            numbers.append(names.index(str(wanted)))
        elif str(wanted).isdecimal() and int(wanted) < len(names):
            numbers.append(int(wanted))
        else:
            near = get_close_matches(str(wanted), names, 1)
            hint = f"did you mean {near[0]}?" if near else f"they are {', '.join(names)}"
            raise UserError(f"no class {wanted!r} in this model: {hint}")
    return tuple(sorted(set(numbers)))
