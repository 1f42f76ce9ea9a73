"""Comparing an exported file with the model that it was made of, on real images."""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import as_file, files
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolov7.boxes import box_iou, frame_table, in_frames
from yolov7.dataset.sample import Dataset, Labels, Sample
from yolov7.engine.frames import to_input
from yolov7.errors import UserError
from yolov7.evaluate.coco import Detections, match
from yolov7.evaluate.run import EVERYTHING
from yolov7.formats import FORMATS, Session
from yolov7.formats.metadata import Metadata
from yolov7.images import read_image
from yolov7.kernels.nms import batched_nms
from yolov7.letterbox import GREY, Geometry, Image, letterbox, letterbox_geometry
from yolov7.sources import some_images

# Relative RMS of boxes, and of scores, against PyTorch in fp32.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "int8": 0.25}
SURE = 0.25  # score of PyTorch's detections that one in int8 is to find
AGREEMENT = 0.8  # AP of the file's detections, with these for labels, at least
MOST_IMAGES = 32
SAME_IOU = 0.99  # of two boxes that are taken for one
SAME_PX = 0.01  # the same for boxes without area: distance of their corners in pixels
CANDIDATES = 100  # best predictions per image that suppression is tried on, at least


@dataclass(frozen=True)
class Check:
    """How far a file's results are from PyTorch's.

    Attributes:
        images: Number of images compared.
        boxes: Relative RMS of the differences of the predicted boxes.
        scores: The same of objectness and classes.
        detections: Detections that agree, in class and place; None without NMS inside.
        ap: Of an int8 file, AP of its detections with PyTorch's for labels; None of another, or
            where PyTorch detects nothing.
    """

    images: int
    boxes: float
    scores: float
    detections: int | None
    ap: float | None = None


@torch.inference_mode()
def check(
    file: Path, target: Path, metadata: Metadata, network: nn.Module, images: list[Image]
) -> Check:
    """Run a file on images.

    Args:
        file: What was exported.
        target: What to call it in messages.
        metadata: Of the file.
        network: Images [B, 3, h, w] to predictions in the file's layout, or in "grid" where the
            file suppresses; in fp32, on the file's device.
        images: Of any sizes.

    Raises:
        UserError: The results differ by more than the precision allows.
    """
    geometries = [letterbox_geometry(image.shape[:2], metadata.imgsz) for image in images]
    expected = torch.cat([network(x) for x in _prepared(images, metadata)]).cpu()[: len(images)]
    threshold = _threshold(expected, metadata)
    run = _runner(file, metadata, threshold)
    outputs = list(zip(*(run(x) for x in _inputs(images, metadata)), strict=True))
    results = [torch.cat(parts).cpu()[: len(images)] for parts in outputs]

    predictions = results[0] if metadata.nms is None else results[2]
    if metadata.letterbox and metadata.nms is None:
        expected = _restored(expected, metadata, geometries)
    axis = 1 if metadata.layout == "classes-first" else 2
    split = [4, expected.shape[axis] - 4]
    errors = [
        _relative_rms(a, b)
        for a, b in zip(
            torch.split(predictions, split, axis), torch.split(expected, split, axis), strict=True
        )
    ]
    limit = TOLERANCE[metadata.precision]
    for what, error in zip(("boxes", "scores"), errors, strict=True):
        if not error <= limit:  # NaN, too
            raise UserError(
                f"{target}: not kept: its {what} differ from PyTorch's by {error:.1e} "
                f"(relative RMS; {metadata.precision} allows {limit:.0e})"
            )
    detections = None
    if metadata.nms is not None:
        wanted = _suppressed(predictions, metadata, threshold, geometries)
        detections = _matched(results[0], results[1], wanted, target)
    ap = None
    if metadata.precision == "int8":
        ap = _agreement(predictions, expected, metadata)
        if ap is not None and not ap >= AGREEMENT:
            raise UserError(
                f"{target}: not kept: its detections have an AP of {ap:.3f} against those of fp32 "
                f"({AGREEMENT} or more is kept): calibrate with images like those to come"
            )
    return Check(len(images), errors[0], errors[1], detections, ap)


def sample_images(folder: Path | None) -> list[Image]:
    """Images of a folder, evenly from the whole; without one, three photographs of two shapes.

    Raises:
        UserError: There is no image, or one cannot be read.
    """
    if folder is not None:
        return [frame.image for frame in some_images(folder, MOST_IMAGES)]
    with as_file(files("yolov7.assets") / "images") as folder:
        first, second, third, *_ = [read_image(path) for path in sorted(folder.glob("*.jpg"))]
    return [first, second[:, :333], third[:211]]


def _prepared(images: list[Image], metadata: Metadata) -> Iterator[Tensor]:
    """Batches [B, 3, h, w], RGB in 0..1; the last of a fixed size is filled up."""
    if metadata.letterbox:
        yield from (_letterboxed(image, metadata) for image in images)
        return
    boxed = [
        letterbox(image, letterbox_geometry(image.shape[:2], metadata.imgsz)) for image in images
    ]
    sizes = [1, len(images) - 1] if metadata.batch == "dynamic" else [metadata.batch]
    start = 0
    while start < len(images):
        for size in sizes:
            chosen = [boxed[index % len(boxed)] for index in range(start, start + size)]
            x = to_input(chosen, torch.device(metadata.device), torch.float32)
            yield x.contiguous()
            start += size


def _letterboxed(image: Image, metadata: Metadata) -> Tensor:
    """What the graph does with an image: as `letterbox`, but pixels are not rounded to uint8."""
    geometry = letterbox_geometry(image.shape[:2], metadata.imgsz)
    x = torch.from_numpy(image).flip(-1).permute(2, 0, 1)[None].float()
    x = F.interpolate(x, size=geometry.size, mode="bilinear", align_corners=False)
    top, bottom, left, right = geometry.border
    return F.pad(x, (left, right, top, bottom), value=GREY) / 255


def _inputs(images: list[Image], metadata: Metadata) -> Iterator[Tensor]:
    if metadata.letterbox:
        return (torch.from_numpy(image.copy()) for image in images)
    return _prepared(images, metadata)


def _runner(file: Path, metadata: Metadata, threshold: float) -> Session:
    """What runs the file; one with NMS also returns what went into it, and suppresses more."""
    made = FORMATS[metadata.kind]
    if metadata.nms is not None:
        return made.reveal(file, threshold)
    return made.open(file, metadata.device, "auto")


def _threshold(expected: Tensor, metadata: Metadata) -> float:
    """The file's, or a lower one where that leaves too little to suppress."""
    if metadata.nms is None:
        return 0.0
    objectness, classes = expected[..., 4], expected[..., 5:]
    scores = objectness if classes.shape[2] == 1 else objectness * classes.amax(2)
    enough = scores.topk(min(CANDIDATES, scores.shape[1])).values[:, -1].min()
    return min(metadata.nms.conf, 0.99 * float(enough))  # the file's scores may be a hair lower


def _restored(predictions: Tensor, metadata: Metadata, geometries: list[Geometry]) -> Tensor:
    """Predictions in pixels of the images: centres and sizes, not clipped, as the file has them."""
    classes_first = metadata.layout == "classes-first"
    rows = predictions.transpose(1, 2) if classes_first else predictions.clone()
    for image, geometry in zip(rows, geometries, strict=True):
        image[:, :2] -= image.new_tensor(geometry.pad)
        image[:, :4] /= image.new_tensor(geometry.ratio * 2)
    return rows.transpose(1, 2) if classes_first else rows


def _relative_rms(a: Tensor, b: Tensor) -> float:
    return float(
        (a.double() - b.double()).square().mean().sqrt() / b.double().square().mean().sqrt()
    )


def _suppressed(
    predictions: Tensor,
    metadata: Metadata,
    threshold: float,
    geometries: list[Geometry],
) -> list[Tensor]:
    """Detections [n, 6] of every image, as PyTorch finds them in the same predictions."""
    assert metadata.nms is not None
    found = batched_nms(
        predictions, conf=threshold, iou=metadata.nms.iou, max_det=metadata.nms.max_det
    )
    rows = [boxes[:count] for boxes, count in zip(found.boxes, found.counts.tolist(), strict=True)]
    if metadata.letterbox:
        for boxes, geometry in zip(rows, geometries, strict=True):
            boxes[:, :4] = in_frames(boxes[None, :, :4], frame_table([geometry]))[0]
    return rows


def _agreement(predictions: Tensor, expected: Tensor, metadata: Metadata) -> float | None:
    """AP of a file's detections, those of PyTorch being the labels."""
    found, wanted = (
        _detections(rows, metadata, conf)
        for rows, conf in ((predictions, EVERYTHING.conf), (expected, SURE))
    )
    samples = [
        Sample(labels=_as_labels(boxes), path=Path(), height=1, width=1, image_id=index)
        for index, boxes in enumerate(wanted)
    ]
    if not any(map(len, wanted)):
        return None
    classes = list(range(len(metadata.names)))
    dataset = Dataset(samples=samples, names=metadata.names, category_ids=classes)
    return match(dataset, found).stats()["AP"]


def _as_labels(boxes: Detections) -> Labels:
    widths, heights = (boxes[:, 2:4] - boxes[:, :2]).T
    return Labels(
        classes=boxes[:, 5].astype(np.int64),
        boxes=boxes[:, :4],
        polygons=tuple([] for _ in boxes),
        crowd=np.zeros(len(boxes), np.bool_),
        areas=(widths * heights).astype(np.float64),
    )


def _detections(rows: Tensor, metadata: Metadata, conf: float) -> list[Detections]:
    """What is found in each image, [n, 6]."""
    if metadata.layout == "classes-first":
        rows = rows.transpose(1, 2)
        rows = torch.cat((rows[..., :4], torch.ones_like(rows[..., :1]), rows[..., 4:]), 2)
    found = batched_nms(
        rows.contiguous(), conf=conf, iou=EVERYTHING.iou, max_det=EVERYTHING.max_det
    )
    return [boxes[:n].numpy() for boxes, n in zip(found.boxes, found.counts.tolist(), strict=True)]


def _matched(boxes: Tensor, counts: Tensor, expected: list[Tensor], target: Path) -> int:
    """The number of detections, which all have to agree in class and place."""
    for found, count, wanted in zip(boxes, counts.tolist(), expected, strict=True):
        found = found[:count]
        if len(found) == len(wanted):
            distance = (found[:, :4] - wanted[:, :4]).abs().amax(1)
            overlap = box_iou(found[:, :4], wanted[:, :4]).diagonal()
            same = (overlap > SAME_IOU) | (distance < SAME_PX)
            if (same & (found[:, 5] == wanted[:, 5])).all():
                continue
        raise UserError(
            f"{target}: not kept: of an image with {len(wanted)} detections it finds "
            f"{count}, or not the same"
        )
    return sum(map(len, expected))
