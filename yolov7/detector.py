"""From a source of images to their boxes: letterbox, network, suppression."""

import copy
import time
import warnings
from collections.abc import Generator, Iterable, Iterator, Sequence
from difflib import get_close_matches
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov7.boxes import clip_boxes, unletterbox
from yolov7.engine.eager import Network, load_network
from yolov7.engine.exported import ExportedNetwork
from yolov7.errors import UserError
from yolov7.kernels.nms import batched_nms
from yolov7.letterbox import GREY, Image, letterbox, letterbox_geometry
from yolov7.model import YOLOv7
from yolov7.results import Boxes, Results
from yolov7.sources import Frame, OnError, Source
from yolov7.speed import Speed
from yolov7.tiling import drop_cut_boxes, tile_grid, to_image

if TYPE_CHECKING:
    from yolov7.engine.graph.captured import Pipelines

WINDOW = 4  # batches of images that are read before those of equal shape are put together
MIN_TILE = 32  # pixels; less would make hundreds of thousands of tiles
TTA_VIEWS = ((1.0, False), (0.83, True), (0.67, False))  # scale, mirrored


class Detector:
    """Finds objects in images.

    Args:
        weights: A file (an exported one, too), the name of a published one, or a model (which is
            copied); None: the embedded demo weights (blood cells).
        variant: Of a bare state dict, where its tensors do not tell.
        device: "auto", "cpu", "cuda", "cuda:N".
        precision: "auto" (fp16 on CUDA, fp32 on a CPU), "fp32", "fp16", "bf16", or "fp8"
            (engine graph, weights that `yolov7 convert` has calibrated).
        engine: "auto", "eager", "compile" (a longer start; one shape for all images), or "graph"
            (CUDA: our kernels; whole images from the frame to the boxes in one captured graph).
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

    Attributes:
        names: Class names by number.
        network: What runs the model.
        imgsz: (height, width) that images are scaled to.
        speed: Times of the images so far.
        startup_s: Seconds that compiling took; 0 with the eager engine.

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
    ) -> None:
        _check(conf=conf, iou=iou, max_det=max_det, batch=batch, tile=tile, overlap=overlap)
        if isinstance(weights, YOLOv7):
            self.network: Network | ExportedNetwork = Network(
                copy.deepcopy(weights), device=device, precision=precision, engine=engine
            )
        else:
            self.network = load_network(
                weights,
                variant=variant,
                device=device,
                precision=precision,
                engine=engine,
                imgsz=imgsz,
                names=names,
                layout=layout,
            )
        self.names = self.network.names
        self.stride = self.network.stride
        self.imgsz = _round_up(self.network.imgsz if imgsz is None else imgsz, self.stride)
        self.conf, self.iou, self.max_det, self.agnostic = conf, iou, max_det, agnostic
        self.classes = None if classes is None else _class_numbers(classes, self.names)
        self.batch, self.tile, self.overlap, self.augment = batch, tile, overlap, augment
        self._one_shape = self.network.one_shape
        if augment and isinstance(self.network, ExportedNetwork):
            raise UserError(f"{weights}: takes one size only: leave augment out")
        self._pipelines: Pipelines | None = None
        if self.network.engine == "graph" and not (tile or augment):
            self._pipelines = self._make_pipelines()
        self.speed = Speed()
        self.startup_s = 0.0
        if self.network.engine == "compile":
            start = time.perf_counter()
            self._predict(torch.zeros(batch, 3, *self.imgsz))
            self.startup_s = time.perf_counter() - start

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
        # A camera's newest frame is worth more than a full batch.
        alone = self.batch == 1 and self._pipelines is None
        size = 1 if source.live or alone else WINDOW * self.batch
        frames = iter(source)
        while window := list(islice(frames, size)):
            if self._pipelines is not None:
                yield from self._detect_graph(window, self._pipelines)
            elif self.tile is None:
                yield from self._detect(window)
            else:
                yield from (self._detect_tiled(frame) for frame in window)

    def _detect(self, frames: list[Frame]) -> Iterator[Results]:
        """Images as a whole, those of equal letterboxed shape together."""
        results: dict[int, Results] = {}
        start = self._now()
        boxed = [self._letterbox(frame.image) for frame in frames]
        pre = (self._now() - start) / len(frames)
        for chunk in self._chunks([image.shape for image, _, _ in boxed]):
            start = self._now()
            x = self._tensor([boxed[index][0] for index in chunk])
            ready = self._now()
            decoded = self._predict(x)
            predicted = self._now()
            found = self._suppress(decoded)
            done = self._now()
            speed = {
                "pre": pre + (ready - start) / len(chunk),
                "network": (predicted - ready) / len(chunk),
                "nms": (done - predicted) / len(chunk),
            }
            for index, (detections, overflow) in zip(chunk, found, strict=False):
                image, ratio, pad = boxed[index]
                frame = frames[index]
                detections[:, :4] = unletterbox(
                    detections[:, :4], ratio, pad, frame.image.shape[:2]
                )
                results[index] = self._result(frame, detections, speed, image.shape[:2], overflow)
        yield from (results[index] for index in range(len(frames)))

    def _detect_graph(self, frames: list[Frame], pipelines: "Pipelines") -> Iterator[Results]:
        """Images as a whole, several batches on their way at a time."""
        start = self._now()
        geometries = [
            letterbox_geometry(frame.image.shape[:2], self.imgsz, stride=self.stride, auto=True)
            for frame in frames
        ]
        under_way = []
        for chunk in self._chunks([geometry.shape for geometry in geometries]):
            images = [frames[index].image for index in chunk]
            try:
                pending = pipelines.submit(images, [geometries[i] for i in chunk])
            except torch.OutOfMemoryError:
                yield from self._fall_back(frames)
                return
            under_way.append((chunk, pending))
        detections, overflow = {}, {}
        for chunk, pending in under_way:
            found = pending.wait()
            for row, index in enumerate(chunk):
                detections[index] = found.boxes[row, : found.counts[row]]
                overflow[index] = int(found.overflow[row])
        # One graph from frame to boxes: its stages have no times of their own.
        speed = {"pre": 0.0, "network": (self._now() - start) / len(frames), "nms": 0.0}
        for index, frame in enumerate(frames):
            shape = geometries[index].shape
            yield self._result(frame, detections[index], speed, shape, overflow[index])

    def _fall_back(self, frames: list[Frame]) -> Iterator[Results]:
        """Go on with the eager engine, for good."""
        assert isinstance(self.network, Network)
        warnings.warn("no memory to build the engine graph: going on with eager", stacklevel=4)
        self._pipelines = None
        self.network.run_eagerly()
        yield from self._detect(frames)

    def _make_pipelines(self) -> "Pipelines":
        from yolov7.engine.graph.captured import Pipelines, Suppression

        assert isinstance(self.network, Network)
        classes = None if self.classes is None else tuple(self.classes.tolist())
        kept = Suppression(
            self.conf, self.iou, self.max_det, agnostic=self.agnostic, classes=classes
        )
        return Pipelines(self.network, self.batch, kept)

    def _detect_tiled(self, frame: Frame) -> Results:
        """One image as a whole and in tiles, with one suppression over all of it."""
        height, width = shape = frame.image.shape[:2]
        assert self.tile is not None
        start = self._now()
        tiles = tile_grid(shape, self.tile, self.overlap)
        views = [(0, 0, width, height), *(tiles if len(tiles) > 1 else [])]
        crops = [frame.image[top:bottom, left:right] for left, top, right, bottom in views]
        boxed = [self._letterbox(crop) for crop in crops]
        speed = {"pre": self._now() - start, "network": 0.0, "nms": 0.0}
        # Suppression works in pixels of the whole image's letterbox: its class offsets are made
        # for coordinates below 4096.
        scale = boxed[0][1][0]
        candidates = []
        for chunk in self._chunks([image.shape for image, _, _ in boxed]):
            start = self._now()
            x = self._tensor([boxed[index][0] for index in chunk])
            ready = self._now()
            decoded = self._predict(x)
            predicted = self._now()
            for index, rows in zip(chunk, decoded, strict=False):
                _, ratio, pad = boxed[index]
                rows = to_image(rows[rows[:, 4] > self.conf], views[index], ratio, pad)
                rows[:, :4] *= scale
                candidates.append(rows)
            speed["pre"] += ready - start
            speed["network"] += predicted - ready
            speed["nms"] += self._now() - predicted
        start = self._now()
        ((detections, overflow),) = self._suppress(torch.cat(candidates)[None])
        if len(tiles) > 1:
            detections = drop_cut_boxes(detections, tiles, shape, scale)
        detections[:, :4] = clip_boxes(detections[:, :4] / scale, shape)
        speed["nms"] += self._now() - start
        return self._result(frame, detections, speed, boxed[0][0].shape[:2], overflow)

    def _letterbox(self, image: Image) -> tuple[Image, tuple[float, float], tuple[float, float]]:
        return letterbox(image, self.imgsz, stride=self.stride, auto=not self._one_shape)

    def _chunks(self, shapes: Sequence[tuple[int, ...]]) -> Iterator[list[int]]:
        """Indices of images of equal shape, at most ``batch`` at a time."""
        equal: dict[tuple[int, ...], list[int]] = {}
        for index, shape in enumerate(shapes):
            equal.setdefault(shape, []).append(index)
        for indices in equal.values():
            for start in range(0, len(indices), self.batch):
                yield indices[start : start + self.batch]

    def _tensor(self, images: Sequence[Image]) -> Tensor:
        """[B, 3, h, w] on the device, RGB in 0..1; B is always ``batch`` with one shape for all."""
        size = self.batch if self._one_shape else len(images)
        pixels = np.zeros((size, *images[0].shape), np.uint8)
        for image, target in zip(images, pixels, strict=False):
            cv2.cvtColor(image, cv2.COLOR_BGR2RGB, dst=target)
        x = torch.from_numpy(pixels).to(self.network.device).permute(0, 3, 1, 2)
        return x.to(self.network.dtype).div_(255)

    def _predict(self, x: Tensor) -> Tensor:
        """Decoded boxes [B, N, 5 + classes] in pixels of x."""
        if not self.augment:
            return self.network(x)
        height, width = x.shape[2:]
        decoded = []
        for scale, mirrored in TTA_VIEWS:
            view = x.flip(3) if mirrored else x
            if scale != 1:
                size = (round(height * scale), round(width * scale))
                view = F.interpolate(view, size=size, mode="bilinear", align_corners=False)
                rounded = _round_up(size, self.stride)
                border = (0, rounded[1] - size[1], 0, rounded[0] - size[0])
                view = F.pad(view, border, value=GREY / 255)
            boxes = self.network(view)
            boxes[..., :4] /= scale
            if mirrored:
                boxes[..., 0] = width - boxes[..., 0]
            decoded.append(boxes)
        return torch.cat(decoded, 1)

    def _suppress(self, decoded: Tensor) -> list[tuple[Tensor, int]]:
        """Of every image, detections [n, 6] on the CPU, and candidates that were left out."""
        classes = None if self.classes is None else self.classes.to(decoded.device)
        found = batched_nms(
            decoded,
            conf=self.conf,
            iou=self.iou,
            agnostic=self.agnostic,
            classes=classes,
            max_det=self.max_det,
        )
        boxes, counts, overflow = found.boxes.cpu(), found.counts.tolist(), found.overflow.tolist()
        return [(boxes[i, :count], overflow[i]) for i, count in enumerate(counts)]

    def _result(
        self,
        frame: Frame,
        detections: Tensor,
        speed: dict[str, float],
        shape: tuple[int, ...],
        overflow: int,
    ) -> Results:
        self.speed.add(speed)
        size = (shape[0], shape[1])
        return Results(frame, Boxes(detections), self.names, speed, size, overflow)

    def _now(self) -> float:
        """Milliseconds, when everything before is done."""
        if self.network.device.type == "cuda":
            torch.cuda.synchronize(self.network.device)
        return time.perf_counter() * 1e3


def _check(
    *, conf: float, iou: float, max_det: int, batch: int, tile: int | None, overlap: float
) -> None:
    for name, share in (("conf", conf), ("iou", iou)):
        if not 0 <= share <= 1:
            raise UserError(f"{name} is {share}: give 0 to 1")
    if not 0 <= overlap < 1:
        raise UserError(f"overlap is {overlap}: give at least 0 and less than 1")
    for name, count in (("max_det", max_det), ("batch", batch)):
        if count < 1:
            raise UserError(f"{name} is {count}: give 1 or more")
    if tile is not None and tile < MIN_TILE:
        raise UserError(f"tile is {tile}: give {MIN_TILE} pixels or more")


def _round_up(size: int | tuple[int, int], stride: int) -> tuple[int, int]:
    """(height, width), each at least ``size`` and a multiple of ``stride``."""
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise UserError(f"imgsz is {size}: give 1 or more")
    return -(-height // stride) * stride, -(-width // stride) * stride


def _class_numbers(classes: Iterable[int | str], names: Sequence[str]) -> Tensor:
    """Class numbers [k] of names or numbers."""
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
    return torch.tensor(sorted(set(numbers)))
