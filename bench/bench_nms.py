"""Non-maximum suppression of 25 200 rows x 80 classes."""

from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.comparison import Comparison, Missing
from yolov7.benchmark.clock import Run, Work, captured
from yolov7.boxes import cxcywh_to_xyxy
from yolov7.kernels.nms import Detections, batched_nms, nms_reference

ROWS, CLASSES, OBJECTS = 25200, 80, 60
PREDICT = {"conf": 0.25, "iou": 0.45, "multi_label": False}
VALIDATE = {"conf": 0.001, "iou": 0.65, "multi_label": True}
MAX_DET, MAX_CANDIDATES = 300, 30000
BATCHES = (1, 32) if torch.cuda.is_available() else (1,)


def scene(batch: int, rows: int, device: torch.device) -> Tensor:
    """Predictions `[batch, rows, 85]`: 60 objects an image, 8 boxes around each, the rest faint."""
    random = torch.Generator().manual_seed(0)
    objects = torch.rand(batch, OBJECTS, 4, generator=random) * torch.tensor([640, 640, 150, 150])
    objects[..., 2:] += 10
    prediction = torch.zeros(batch, rows, 5 + CLASSES)
    owner = torch.randint(OBJECTS, (batch, rows), generator=random)
    owned = objects.gather(1, owner[..., None].expand(-1, -1, 4))
    noise = torch.randn(batch, rows, 4, generator=random)
    prediction[..., :4] = owned + 0.1 * noise * owned[..., 2:].repeat(1, 1, 2)
    prediction[..., 2:4].clamp_(min=2)
    prediction[..., 4] = torch.rand(batch, rows, generator=random) ** 6 * 0.1
    prediction[:, : 8 * OBJECTS, 4] = 0.3 + 0.7 * torch.rand(batch, 8 * OBJECTS, generator=random)
    prediction[..., 5:] = torch.rand(batch, rows, CLASSES, generator=random) ** 8 * 0.5
    prediction[..., 5:].scatter_(2, (owner % CLASSES)[..., None], 0.98)
    return prediction.to(device)


def eager(prediction: Tensor, options: dict[str, Any]) -> Detections:
    """The same in plain PyTorch."""
    limits = (*options.values(), False, MAX_DET, MAX_CANDIDATES)
    return Detections(*nms_reference(prediction, None, None, *limits))


def torchvision_loop(prediction: Tensor, options: dict[str, Any]) -> Detections:
    """Image by image, as detectors call torchvision's NMS."""
    from torchvision.ops import batched_nms as torchvision_nms

    conf = options["conf"]
    boxes = prediction.new_zeros(len(prediction), MAX_DET, 6)
    counts = []
    for image, rows in enumerate(prediction):
        rows = rows[rows[:, 4] > conf]
        scores = rows[:, 5:] * rows[:, 4:5]
        if options["multi_label"]:
            row, label = (scores > conf).nonzero(as_tuple=True)
            score = scores[row, label]
        else:
            score, label = scores.max(1)
            row = (score > conf).nonzero()[:, 0]
            score, label = score[row], label[row]
        order = score.argsort(descending=True)[:MAX_CANDIDATES]
        row, label, score = row[order], label[order], score[order]
        corners = cxcywh_to_xyxy(rows[row, :4])
        kept = torchvision_nms(corners, score, label, options["iou"])[:MAX_DET]
        found = torch.cat([corners, score[:, None], label[:, None]], 1)[kept]
        boxes[image, : len(kept)] = found
        counts.append(len(kept))
    return Detections(boxes, torch.tensor(counts, dtype=torch.int32), torch.zeros(0))


def agree(actual: Detections, expected: Detections) -> None:
    """The same number of boxes but for those whose IoU lies at the threshold, and their scores."""
    counts = actual.counts.cpu() - expected.counts.cpu()
    assert counts.abs().max() <= 0.02 * expected.counts.max(), f"counts differ by {counts}"
    difference = (actual.boxes[..., 4] - expected.boxes[..., 4]).abs().mean()
    assert difference <= 1e-3, f"scores differ by {difference} on average"


CASES = {
    f"batch {batch}, {name}": (batch, options)
    for batch in BATCHES
    for name, options in (("conf 0.25", PREDICT), ("conf 0.001, multi-label", VALIDATE))
}


@pytest.mark.parametrize(("batch", "options"), CASES.values(), ids=CASES)
def bench_nms(
    batch: int, options: dict[str, Any], compete: Comparison, device: torch.device, smoke: bool
) -> None:
    """Ours against the same in plain PyTorch and torchvision's, called image by image."""
    prediction = scene(batch, 8 * OBJECTS + 32 if smoke else ROWS, device)
    contenders: dict[str, Run | Missing] = {
        "ours": captured(partial(batched_nms, prediction, **options), device),
        "eager": partial(eager, prediction, options)
        if device.type == "cuda"
        else Missing("on a CPU it is ours"),
        "torchvision": partial(torchvision_loop, prediction, options)
        if find_spec("torchvision")
        else Missing("torchvision is not installed"),
    }

    # A sector of every row for its objectness; with every class of interest the whole row.
    row = (5 + CLASSES) * 4 if options["multi_label"] else 32
    compete(contenders, agree=agree, work=Work(bytes=batch * ROWS * row, items=batch))
