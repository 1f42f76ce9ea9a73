"""Run a network over the images of a data set.

How images are prepared moves AP by several thousandths. The default is what the published figures
were made with: an image is scaled so that its longer side is `imgsz` (area interpolation when it
shrinks) and laid in the middle of a grey canvas, without a second scaling. Images are sorted by
height / width; 32 neighbours share a canvas, whose sides are the next multiple of the stride after
half a stride more than the sides of their extreme aspect.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice
from typing import Literal

import cv2
import numpy as np
from torch import Tensor

from yolov7.capture import ahead
from yolov7.dataset import Dataset, Problem, Sample
from yolov7.engine.choose import open_frames
from yolov7.engine.frames import Forward, Frames, HostFrames, Pixels
from yolov7.errors import UserError
from yolov7.evaluate.coco import Detections
from yolov7.evaluate.metric import Evaluation, measure
from yolov7.images import read_image
from yolov7.letterbox import Geometry, Image, letterbox_geometry
from yolov7.progress import progress
from yolov7.suppression import Suppression

Preparation = Literal["authors", "letterbox", "square"]
GROUP = 32  # images that share a canvas
READERS = 4  # threads that decode and resize
AHEAD = 2  # batches that they may be ahead of the network
Follow = Callable[[list[Sample], Tensor, list[Geometry]], None]
EVERYTHING = Suppression(conf=0.001, iou=0.65, multi_label=True)  # as the published figures


@dataclass(frozen=True)
class Settings:
    """How a network is evaluated; the defaults are those of the published figures.

    Attributes:
        imgsz: Longer side of the images, pixels; a multiple of the model's stride.
        batch: Images per call of the network; the result does not depend on it.
        suppression: Which boxes count.
        preparation: `authors` (see above), `letterbox` (each image on the smallest canvas of its
            own), or `square` (all of imgsz x imgsz, for a network of fixed size).
    """

    imgsz: int = 640
    batch: int = 32
    suppression: Suppression = EVERYTHING
    preparation: Preparation = "authors"


@dataclass
class Predictions:
    """What a network found in a data set.

    Attributes:
        dataset: The images that could be read; the others are listed in its `skipped`.
        detections: For each of them [n, 6]: x1, y1, x2, y2 in its pixels, score, class.
        speed: Milliseconds per image: read (decode the file), pre (resize, canvas, to the device),
            network, nms (and boxes back to the image); of a captured graph, whole.
    """

    dataset: Dataset
    detections: list[Detections]
    speed: dict[str, float] = field(default_factory=dict)


def evaluate(network: Forward, dataset: Dataset, settings: Settings) -> Evaluation:
    """Run a network over a data set and compare what it finds with the labels.

    Args:
        network: From `yolov7.engine.choose.open_network`, or another.
        dataset: The images and their labels.
        settings: How images are prepared and detections chosen.

    Raises:
        UserError: As of `predict`.
    """
    predictions = predict(network, dataset, settings)
    return measure(predictions.dataset, predictions.detections, predictions.speed)


def predict(
    network: Forward, dataset: Dataset, settings: Settings, follow: Follow | None = None
) -> Predictions:
    """Run a network over the images of a data set.

    Args:
        network: From `yolov7.engine.choose.open_network`, or another.
        dataset: The images.
        settings: How images are prepared and detections chosen.
        follow: Called with what the network makes of every batch: its samples, boxes [B, N,
            5 + classes] in pixels of the letterboxes before any is suppressed, on the network's
            device, and these letterboxes. Nothing is captured then.

    Raises:
        UserError: The network has another number of classes than the data set, or no image can
            be read.
    """
    if len(network.names) != len(dataset.names):
        raise UserError(
            f"the network knows {len(network.names)} classes, the data set has "
            f"{len(dataset.names)}: give weights that were trained on it"
        )
    samples = dataset.samples
    frames: Frames
    if follow is None:
        frames = open_frames(network, settings.suppression, settings.batch)
    else:
        frames = followed = _Followed(network, settings.suppression, settings.batch)
    clock: dict[str, float] = dict.fromkeys(("read", "pre"), 0.0)
    found: list[Detections | None] = [None] * len(samples)
    skipped = list(dataset.skipped)
    batches = plan_batches(samples, settings, network.stride)
    for indices, items in progress(
        _load(samples, batches, settings, network.stride, frames), "evaluating", len(batches)
    ):
        skipped += [
            Problem.of("unusable image", samples[index].path, item)
            for index, item in zip(indices, items, strict=True)
            if isinstance(item, UserError)
        ]
        ready = [(i, it) for i, it in zip(indices, items, strict=True) if isinstance(it, _Prepared)]
        if not ready:
            continue
        where = [item.where for _, item in ready]
        kept = frames.submit([item.pixels for _, item in ready], where).wait()
        if follow is not None:
            follow([samples[index] for index, _ in ready], followed.decoded, where)
        for (index, item), (boxes, _) in zip(ready, kept.rows(), strict=True):
            found[index] = boxes.numpy().copy()
            clock["read"] += item.read
            clock["pre"] += item.pre
        for stage, ms in kept.ms.items():
            clock[stage] = clock.get(stage, 0.0) + ms
    detections = [boxes for boxes in found if boxes is not None]
    if not detections:
        raise UserError(f"no image can be read: {skipped[-1]}")
    read = [sample for sample, boxes in zip(samples, found, strict=True) if boxes is not None]
    speed = {stage: ms / len(read) for stage, ms in clock.items()}
    return Predictions(replace(dataset, samples=read, skipped=skipped), detections, speed)


class _Followed(HostFrames):
    """The host's way, with what the network made of the last batch."""

    decoded: Tensor

    def decode(
        self, prepared: Sequence[Pixels], where: Sequence[Geometry]
    ) -> tuple[Tensor, dict[str, float]]:
        self.decoded, ms = super().decode(prepared, where)
        return self.decoded, ms


def by_aspect(samples: Sequence[Sample]) -> list[int]:
    """Positions of the samples by height / width: each `GROUP` of them shares a canvas."""
    return sorted(range(len(samples)), key=lambda i: samples[i].height / samples[i].width)


def plan_batches(
    samples: Sequence[Sample], settings: Settings, stride: int
) -> list[tuple[list[int], tuple[int, int]]]:
    """Which images go through the network together, and on which canvas.

    Returns:
        Positions of the samples, by aspect, and height and width of the canvas they share.
    """
    order = by_aspect(samples)
    canvases: list[tuple[int, int]] = []
    if settings.preparation == "authors":
        for start in range(0, len(order), GROUP):
            group = [samples[index] for index in order[start : start + GROUP]]
            canvases += [_group_canvas(group, settings.imgsz, stride)] * len(group)
    else:
        for index in order:
            shape = (samples[index].height, samples[index].width)
            auto = settings.preparation == "letterbox"
            canvases.append(
                letterbox_geometry(shape, settings.imgsz, stride=stride, auto=auto).shape
            )
    batches: list[tuple[list[int], tuple[int, int]]] = []
    for canvas, members in groupby(zip(order, canvases, strict=True), key=lambda pair: pair[1]):
        indices = [index for index, _ in members]
        starts = range(0, len(indices), settings.batch)
        batches += [(indices[start : start + settings.batch], canvas) for start in starts]
    return batches


def _group_canvas(group: Sequence[Sample], imgsz: int, stride: int) -> tuple[int, int]:
    aspects = [sample.height / sample.width for sample in group]
    sides = (1.0, 1.0)
    if max(aspects) < 1:
        sides = (max(aspects), 1.0)
    elif min(aspects) > 1:
        sides = (1.0, 1 / min(aspects))
    height, width = (math.ceil(side * imgsz / stride + 0.5) * stride for side in sides)
    return height, width


@dataclass(frozen=True)
class _Prepared:
    """What goes into the frames' way, where it lies there, and the milliseconds that it took."""

    pixels: Pixels
    where: Geometry
    read: float
    pre: float


def _load(
    samples: Sequence[Sample],
    batches: Sequence[tuple[list[int], tuple[int, int]]],
    settings: Settings,
    stride: int,
    frames: Frames,
) -> Iterator[tuple[list[int], list["_Prepared | UserError"]]]:
    """Prepare batch after batch in threads, a few images ahead of the network."""
    calls = (
        partial(_prepare, samples[index], canvas, settings, stride, frames)
        for indices, canvas in batches
        for index in indices
    )
    with closing(ahead(calls, READERS, waiting=AHEAD * settings.batch)) as prepared:
        for indices, _ in batches:
            yield indices, list(islice(prepared, len(indices)))


def _prepare(
    sample: Sample, canvas: tuple[int, int], settings: Settings, stride: int, frames: Frames
) -> "_Prepared | UserError":
    started = time.perf_counter()
    try:
        image = read_image(sample.path)
    except UserError as error:
        return error
    read = time.perf_counter()
    shape = image.shape[:2]
    if shape != (sample.height, sample.width):
        return UserError(f"{sample.path}: has changed since the data set was read: start again")
    if settings.preparation == "authors":
        image = _scale(image, settings.imgsz)
        where = letterbox_geometry(image.shape[:2], canvas, scaleup=False).seen_from(shape)
    else:
        auto = settings.preparation == "letterbox"
        where = letterbox_geometry(shape, settings.imgsz, stride=stride, auto=auto)
    pixels = frames.prepare(image, where)
    done = time.perf_counter()
    return _Prepared(pixels, where, 1e3 * (read - started), 1e3 * (done - read))


def _scale(image: Image, longest: int) -> Image:
    """The image with its longer side of `longest` pixels, the other rounded down."""
    height, width = image.shape[:2]
    ratio = longest / max(height, width)
    if ratio == 1:
        return image
    method = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR
    size = max(int(width * ratio), 1), max(int(height * ratio), 1)
    return np.asarray(cv2.resize(image, size, interpolation=method), np.uint8)
