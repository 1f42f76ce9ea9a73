"""The batch that was asked for, or the largest that a GPU's memory holds."""

import copy

import torch

from yolov7.errors import UserError
from yolov7.model import YOLOv7
from yolov7.train.data import STRETCH, stretched
from yolov7.train.distributed import Ranks, share
from yolov7.train.loss import Loss
from yolov7.train.options import Train
from yolov7.train.precision import autocast

CPU_BATCH = 16
FILLED = 0.85  # of the free memory
PROBES = (2, 6)  # batches whose memory is measured


def batch_size(
    options: Train,
    model: YOLOv7,
    loss: Loss,
    images: int,
    size: int,
    dtype: torch.dtype,
    ranks: Ranks,
) -> int:
    """Images of a step, on all ranks together.

    Args:
        options: the batch, and whether images grow.
        model: stays as it is.
        loss: of its outputs.
        images: in the data set.
        size: their side in pixels.
        dtype: what the network computes in.
        ranks: which process this is.

    Raises:
        UserError: the ranks cannot share it.
    """
    if options.batch % ranks.world:
        raise UserError(f"--batch {options.batch} cannot be shared among {ranks.world} processes")
    if options.batch:
        return options.batch
    side = stretched(size, model.stride, STRETCH[1] if options.multi_scale else 1.0)
    probe = copy.deepcopy(model).train()
    fits = share(largest_batch(probe, loss, side, model.head.anchors.device, dtype), ranks)
    batch = min(fits, images) * ranks.world
    ranks.say(f"batches of {batch} images")
    return batch


def largest_batch(
    model: YOLOv7, loss: Loss, size: int, device: torch.device, dtype: torch.dtype
) -> int:
    """Extrapolate the memory of a training step; on a CPU 16.

    Raises:
        UserError: the probes do not fit.
    """
    if device.type != "cuda":
        return CPU_BATCH
    used = []
    try:
        for batch in PROBES:
            torch.cuda.reset_peak_memory_stats(device)
            images = torch.zeros(batch, 3, size, size, device=device)
            images = images.contiguous(memory_format=torch.channels_last)
            labels = torch.tensor([0, 0.5, 0.5, 0.2, 0.2]).repeat(batch, 50, 1)
            with autocast(device, dtype):
                outputs = model(images)
            terms = loss(outputs, labels)
            (terms["box"] + terms["objectness"] + terms["classes"]).backward()
            used.append(torch.cuda.max_memory_allocated(device))
            model.zero_grad(set_to_none=True)
    except torch.OutOfMemoryError:
        raise UserError(
            f"not even {PROBES[0]} images of {size} pixels fit: lower --imgsz"
        ) from None
    finally:
        torch.cuda.empty_cache()
    image = (used[1] - used[0]) / (PROBES[1] - PROBES[0])
    fixed = used[0] - PROBES[0] * image
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return max(1, int((FILLED * free - fixed) / image))
