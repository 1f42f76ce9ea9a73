"""Run a network over the images of a data set.

How images are prepared moves AP by several thousandths. The default is what the published figures
were made with: an image is scaled so that its longer side is `imgsz` (area interpolation when it
shrinks) and laid in the middle of a grey canvas, without a second scaling. Images are sorted by
height / width; 32 neighbours share a canvas, whose sides are the next multiple of the stride after
half a stride more than the sides of their extreme aspect.
"""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import groupby
from typing import Literal

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from yolov7.boxes import unletterbox
from yolov7.dataset import Dataset, Sample
from yolov7.errors import UserError
from yolov7.evaluate.metric import Detections, Evaluation, measure
from yolov7.kernels.nms import batched_nms
from yolov7.letterbox import Image, letterbox, letterbox_geometry
from yolov7.progress import progress
from yolov7.sources import read_image

Forward = Callable[[Tensor], Tensor]
Preparation = Literal["authors", "letterbox", "square"]
GROUP = 32  # images that share a canvas
READERS = 4  # threads that decode and resize
AHEAD = 2  # batches that they may be ahead of the network


@dataclass(frozen=True)
class Settings:
    """How a network is evaluated; the defaults are those of the published figures.

    Attributes:
        imgsz: Longer side of the images, pixels.
        stride: Of the model, pixels: the sides of its input are multiples of it.
        batch: Images per call of the network; the result does not depend on it.
        conf: Confidence that a detection must exceed.
        iou: IoU with a better detection of its class from which one is dropped.
        max_det: Detections per image.
        preparation: `authors` (see above), `letterbox` (each image on the smallest canvas of its
            own), or `square` (all of imgsz x imgsz, for a network of fixed size).
    """

    imgsz: int = 640
    stride: int = 32
    batch: int = 32
    conf: float = 0.001
    iou: float = 0.65
    max_det: int = 300
    preparation: Preparation = "authors"


@dataclass
class Predictions:
    """What a network found in a data set.

    Attributes:
        dataset: The images that could be read; the others are listed in its `skipped`.
        detections: For each of them [n, 6]: x1, y1, x2, y2 in its pixels, score, class.
        speed: Milliseconds per image: read (decode the file), pre (resize, canvas, to the device),
            network, nms (and boxes back to the image).
    """

    dataset: Dataset
    detections: list[Detections]
    speed: dict[str, float] = field(default_factory=dict)


def evaluate(
    network: Forward,
    dataset: Dataset,
    settings: Settings,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Evaluation:
    """Run a network over a data set and compare what it finds with the labels; see `predict`."""
    predictions = predict(network, dataset, settings, device=device, dtype=dtype)
    return measure(predictions.dataset, predictions.detections, predictions.speed)


@torch.inference_mode()
def predict(
    network: Forward,
    dataset: Dataset,
    settings: Settings,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> Predictions:
    """Run a network over the images of a data set.

    Args:
        network: Takes RGB images [B, 3, H, W] in 0..1, returns decoded predictions [B, N, 5 + nc]:
            centre x, centre y, width, height in pixels, objectness, class probabilities. A module
            must be in evaluation mode.
        dataset: The images.
        settings: How images are prepared and detections chosen.
        device: Where the network takes its input.
        dtype: What it takes.

    Raises:
        UserError: The network has another number of classes than the data set, or no image can
            be read.
    """
    device = torch.device(device)
    samples = dataset.samples
    batches = plan_batches(samples, settings)
    clock = dict.fromkeys(("read", "pre", "network", "nms"), 0.0)
    found: list[Detections | None] = [None] * len(samples)
    skipped = list(dataset.skipped)
    loaded = progress(_load(samples, batches, settings), "evaluating", len(batches))
    for indices, items in loaded:
        skipped += [str(item) for item in items if isinstance(item, UserError)]
        ready = [(i, it) for i, it in zip(indices, items, strict=True) if isinstance(it, _Prepared)]
        if not ready:
            continue
        started = time.perf_counter()
        images = torch.from_numpy(np.stack([item.image for _, item in ready])).to(device)
        images = images.flip(-1).permute(0, 3, 1, 2).to(dtype).div_(255).contiguous()
        started = _lap(clock, "pre", started, device)
        prediction = network(images)
        started = _lap(clock, "network", started, device)
        kept = _suppress(prediction, settings, len(dataset.names))
        for (index, item), boxes in zip(ready, kept, strict=True):
            found[index] = _to_image(boxes, item, samples[index])
            clock["read"] += item.read
            clock["pre"] += item.pre
        _lap(clock, "nms", started, device)
    detections = [boxes for boxes in found if boxes is not None]
    if not detections:
        raise UserError(f"no image can be read: {skipped[-1]}")
    read = [sample for sample, boxes in zip(samples, found, strict=True) if boxes is not None]
    speed = {stage: 1000 * seconds / len(read) for stage, seconds in clock.items()}
    return Predictions(
        Dataset(read, dataset.names, dataset.category_ids, skipped), detections, speed
    )


def _suppress(prediction: Tensor, settings: Settings, classes: int) -> list[Tensor]:
    """The boxes [n, 6] of every image, on the CPU."""
    known = prediction.shape[2] - 5
    if known != classes:
        raise UserError(
            f"the network knows {known} classes, the data set has {classes}: "
            "give weights that were trained on it"
        )
    kept = batched_nms(
        prediction,
        conf=settings.conf,
        iou=settings.iou,
        multi_label=True,
        max_det=settings.max_det,
    )
    boxes = kept.boxes.cpu()
    return [boxes[image, :count] for image, count in enumerate(kept.counts.tolist())]


def plan_batches(
    samples: Sequence[Sample], settings: Settings
) -> list[tuple[list[int], tuple[int, int]]]:
    """Which images go through the network together, and on which canvas.

    Returns:
        Positions of the samples, by aspect, and height and width of the canvas they share.
    """
    order = sorted(range(len(samples)), key=lambda i: samples[i].height / samples[i].width)
    canvases: list[tuple[int, int]] = []
    if settings.preparation == "authors":
        for start in range(0, len(order), GROUP):
            group = [samples[index] for index in order[start : start + GROUP]]
            canvases += [_group_canvas(group, settings)] * len(group)
    else:
        for index in order:
            shape = (samples[index].height, samples[index].width)
            auto = settings.preparation == "letterbox"
            canvases.append(
                letterbox_geometry(shape, settings.imgsz, stride=settings.stride, auto=auto).shape
            )
    batches: list[tuple[list[int], tuple[int, int]]] = []
    for canvas, members in groupby(zip(order, canvases, strict=True), key=lambda pair: pair[1]):
        indices = [index for index, _ in members]
        starts = range(0, len(indices), settings.batch)
        batches += [(indices[start : start + settings.batch], canvas) for start in starts]
    return batches


def _group_canvas(group: Sequence[Sample], settings: Settings) -> tuple[int, int]:
    aspects = [sample.height / sample.width for sample in group]
    sides = (1.0, 1.0)
    if max(aspects) < 1:
        sides = (max(aspects), 1.0)
    elif min(aspects) > 1:
        sides = (1.0, 1 / min(aspects))
    height, width = (
        math.ceil(side * settings.imgsz / settings.stride + 0.5) * settings.stride for side in sides
    )
    return height, width


@dataclass(frozen=True)
class _Prepared:
    """An image on its canvas, where it lies there, and the seconds that this took."""

    image: Image
    ratio: tuple[float, float]
    pad: tuple[float, float]
    read: float
    pre: float


def _load(
    samples: Sequence[Sample],
    batches: Sequence[tuple[list[int], tuple[int, int]]],
    settings: Settings,
) -> Iterator[tuple[list[int], list["_Prepared | UserError"]]]:
    """Prepare batch after batch in threads, a few ahead of the network."""
    with ThreadPoolExecutor(READERS) as pool:
        waiting: deque[tuple[list[int], list[Future[_Prepared | UserError]]]] = deque()
        for indices, canvas in batches:
            jobs = [pool.submit(_prepare, samples[i], canvas, settings) for i in indices]
            waiting.append((indices, jobs))
            if len(waiting) > AHEAD:
                done, ready = waiting.popleft()
                yield done, [job.result() for job in ready]
        while waiting:
            done, ready = waiting.popleft()
            yield done, [job.result() for job in ready]


def _prepare(
    sample: Sample, canvas: tuple[int, int], settings: Settings
) -> "_Prepared | UserError":
    started = time.perf_counter()
    try:
        image = read_image(sample.path)
    except UserError as error:
        return error
    read = time.perf_counter()
    height, width = image.shape[:2]
    if (height, width) != (sample.height, sample.width):
        return UserError(f"{sample.path}: has changed since the data set was read: start again")
    if settings.preparation == "authors":
        image = _scale(image, settings.imgsz)
        first = (image.shape[1] / width, image.shape[0] / height)
        image, (ratio_x, ratio_y), pad = letterbox(image, canvas, scaleup=False)
        ratio = (first[0] * ratio_x, first[1] * ratio_y)
    else:
        auto = settings.preparation == "letterbox"
        image, ratio, pad = letterbox(image, settings.imgsz, stride=settings.stride, auto=auto)
    return _Prepared(image, ratio, pad, read - started, time.perf_counter() - read)


def _scale(image: Image, longest: int) -> Image:
    """The image with its longer side of `longest` pixels, the other rounded down."""
    height, width = image.shape[:2]
    ratio = longest / max(height, width)
    if ratio == 1:
        return image
    method = cv2.INTER_AREA if ratio < 1 else cv2.INTER_LINEAR
    size = max(int(width * ratio), 1), max(int(height * ratio), 1)
    return np.asarray(cv2.resize(image, size, interpolation=method), np.uint8)


def _to_image(boxes: Tensor, item: _Prepared, sample: Sample) -> NDArray[np.float32]:
    boxes = boxes.clone()
    boxes[:, :4] = unletterbox(boxes[:, :4], item.ratio, item.pad, (sample.height, sample.width))
    return boxes.numpy()


def _lap(clock: dict[str, float], stage: str, started: float, device: torch.device) -> float:
    """Add the time since `started` to a stage and return the present."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # the host's clock is to see the device's work
    now = time.perf_counter()
    clock[stage] += now - started
    return now
