"""The YOLOv7 loss: box (CIoU), objectness and class terms over the matches of an assigner."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from yolov7.errors import UserError
from yolov7.model import YOLOv7
from yolov7.train.assigner import (
    AnchorAssigner,
    Anchors,
    SimOTAAssigner,
    Slots,
    gather_boxes,
    scale_boxes,
    to_device,
)

OBJECTNESS_BALANCE = {3: (4.0, 1.0, 0.4), 4: (4.0, 1.0, 0.25, 0.06)}  # by number of levels
AUXILIARY_SHARE = 0.25


@dataclass(frozen=True)
class LossWeights:
    """What the unweighted terms count for in the sum.

    Args:
        box, objectness, classes: the gains.
        auxiliary: share of the auxiliary head's terms.
    """

    box: float
    objectness: float
    classes: float
    auxiliary: float = AUXILIARY_SHARE

    @classmethod
    def scaled(
        cls, box: float, objectness: float, classes: float, *, levels: int, nc: int, size: float
    ) -> "LossWeights":
        """The gains of a preset for a head of so many levels and classes and an image side."""
        share = 3 / levels
        return cls(
            box=box * share,
            objectness=objectness * (size / 640) ** 2 * share,
            classes=classes * nc / 80 * share,
        )

    def weigh(self, terms: dict[str, Tensor]) -> dict[str, Tensor]:
        """Weighted box, objectness and class loss, auxiliary terms added to the lead's."""
        gains = {"box": self.box, "objectness": self.objectness, "classes": self.classes}
        return {
            name: gain * (terms[name] + self.auxiliary * terms.get(f"auxiliary_{name}", 0))
            for name, gain in gains.items()
        }


class Loss(nn.Module):
    """Unweighted loss terms of a batch.

    Which cells are positive is the assigner's decision. Under `torch.distributed` the means are
    over the matches of all ranks, so that the average of the ranks' gradients is the gradient of
    the whole batch, unless each rank is `alone` with its own number of batches.

    Args:
        anchors: the head's geometry.
        nc: number of classes.
        assigner: gives the lead head's matches.
        auxiliary_assigner: gives the auxiliary head's matches, from the lead's predictions; None
            for heads without one.
        label_smoothing: positives are 1 - e/2, negatives e/2.
        alone: see above.
    """

    def __init__(
        self,
        anchors: Anchors,
        nc: int,
        assigner: AnchorAssigner,
        *,
        auxiliary_assigner: AnchorAssigner | None = None,
        label_smoothing: float = 0.0,
        alone: bool = False,
    ) -> None:
        super().__init__()
        self.anchors = anchors
        self.nc = nc
        self.assigner = assigner
        self.auxiliary_assigner = auxiliary_assigner
        self.label_smoothing = label_smoothing
        self.alone = alone
        self.balance = OBJECTNESS_BALANCE[len(anchors.strides)]

    def forward(self, raw: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Compute the terms, in fp32.

        Args:
            raw: outputs `[B, na, ny, nx, 5 + nc]` of the lead levels, then the auxiliary levels.
            labels: `[B, M, 5]` with M >= 1, see `yolov7.train.assigner`; best left on the CPU,
                where the number of candidates is known.

        Returns:
            box: mean of 1 - CIoU over the matches of a level, summed over levels.
            objectness: mean BCE over a level's cells times the level's balance, summed.
            classes: mean BCE over matches and classes, summed; 0 with one class.
            auxiliary_box, auxiliary_objectness, auxiliary_classes: the same of the auxiliary head.
            matches, overflow: for reports: matches in all, candidates that found no slot.

        Raises:
            ValueError: outputs and labels do not fit this head.
        """
        levels = len(self.anchors.strides)
        heads = 1 if self.auxiliary_assigner is None else 2
        if len(raw) != levels * heads or any(x.shape[-1] != 5 + self.nc for x in raw):
            raise ValueError(
                f"expected {levels * heads} outputs of {5 + self.nc} channels, got shapes "
                f"{[tuple(x.shape) for x in raw]}"
            )
        if labels.ndim != 3 or labels.shape[2] != 5 or 0 in labels.shape[:2]:
            raise ValueError(f"expected labels [B, M >= 1, 5], got {tuple(labels.shape)}")
        lead = [x.detach() for x in raw[:levels]]
        slots = self.assigner(lead, labels)
        truth = to_device(labels, raw[0].device)
        terms = self._head_terms(raw[:levels], truth, slots)
        overflow = slots.overflow
        if self.auxiliary_assigner is not None:
            coarse = self.auxiliary_assigner(lead, labels)
            auxiliary = self._head_terms(raw[levels:], truth, coarse)
            terms |= {f"auxiliary_{name}": term for name, term in auxiliary.items()}
            overflow = overflow + coarse.overflow
        return {**terms, "matches": slots.mask.sum(), "overflow": overflow.sum()}

    def _head_terms(self, raw: list[Tensor], labels: Tensor, slots: Slots) -> dict[str, Tensor]:
        """Box, objectness and class terms of one head."""
        parts = slots.levels()
        positives = torch.stack([part.mask.sum() for part in parts]).float()
        ranks = 1
        if dist.is_initialized() and not self.alone:
            dist.all_reduce(positives)
            ranks = dist.get_world_size()
        # Clamped as the sum over ranks: a share of one match may well be less than 1.
        counts = positives.clamp(min=1) / ranks
        anchors = self.anchors.on(labels.device)
        box, objectness, classes = [], [], []
        for level, (x, part, stride) in enumerate(
            zip(raw, parts, self.anchors.strides, strict=True)
        ):
            rows, logits = _read(x, part)
            target = gather_boxes(labels, part)
            wanted = scale_boxes(target, x.shape[3], x.shape[2])
            wanted[..., :2] -= torch.stack([part.column, part.row], -1)
            decoded = _decode(rows, anchors[level][part.anchor] / stride)
            iou = complete_iou(decoded, wanted)
            box.append(torch.where(part.mask, 1 - iou, 0).sum() / counts[level])
            term = self._class_term(rows[..., 5:], target[..., 0], part.mask)
            classes.append(term / counts[level])
            term = self._objectness_term(logits, part, iou.detach())
            objectness.append(term * self.balance[level])
        return {
            "box": torch.stack(box).sum(),
            "objectness": torch.stack(objectness).sum(),
            "classes": torch.stack(classes).sum(),
        }

    def _class_term(self, logits: Tensor, classes: Tensor, mask: Tensor) -> Tensor:
        """Sum over matches of the classes' mean BCE; logits `[B, C, nc]`."""
        if self.nc == 1:
            return logits.sum() * 0
        negative = self.label_smoothing / 2
        target = torch.full_like(logits, negative)
        target.scatter_(2, classes.long().clamp(min=0)[..., None], 1 - negative)
        loss = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
        return torch.where(mask[..., None], loss, 0).sum() / self.nc

    def _objectness_term(self, logits: Tensor, slots: Slots, iou: Tensor) -> Tensor:
        """Mean BCE over all cells `[B, na, ny, nx]`; a cell's target is its last match's CIoU."""
        b, na, ny, nx = logits.shape
        cell = (slots.anchor * ny + slots.row) * nx + slots.column  # [B, C]
        order = torch.arange(cell.shape[1], device=cell.device)
        last = cell.new_full((b, na * ny * nx), -1)
        last.scatter_reduce_(1, cell, torch.where(slots.mask, order, -1), "amax")
        target = torch.where(last < 0, 0, iou.clamp(min=0).gather(1, last.clamp(min=0)))
        return F.binary_cross_entropy_with_logits(logits, target.view_as(logits))


class _Reader(torch.autograd.Function):
    """What the loss reads of a level: a row of each slot, and the objectness of every cell.

    Both gradients go into one tensor of the layout of the outputs, written once: 80 classes on
    320 pixels, this is a third of the loss's time.
    """

    @staticmethod
    def forward(ctx: Any, raw: Tensor, *cells: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*cells)
        ctx.layout = (raw.shape, raw.stride(), raw.dtype, raw.device)
        return raw[cells].float(), raw[..., 4].to(torch.float32, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        shape, stride, dtype, device = ctx.layout
        rows, objectness = gradients
        grad = torch.empty_strided(shape, stride, dtype=dtype, device=device).zero_()
        grad[..., 4] = objectness
        # Unsafe: without a look at the indices, which would have to wait for the device.
        torch.ops.aten._index_put_impl_(grad, ctx.saved_tensors, rows.to(dtype), True, True)
        return grad, None, None, None, None


def _read(raw: Tensor, slots: Slots) -> tuple[Tensor, Tensor]:
    """Rows `[B, C, no]` and objectness `[B, na, ny, nx]` of raw outputs, in fp32."""
    image = torch.arange(len(raw), device=raw.device)[:, None]
    cells = (image, slots.anchor, slots.row, slots.column)
    read: tuple[Tensor, Tensor] = _Reader.apply(raw, *cells)  # type: ignore[no-untyped-call]
    return read


def _decode(rows: Tensor, anchors: Tensor) -> Tensor:
    """Raw rows `[..., 4+]` to centre relative to the cell and size, in cells (`anchors` too)."""
    unit = rows[..., :4].sigmoid() * 2
    return torch.cat([unit[..., :2] - 0.5, unit[..., 2:] ** 2 * anchors], -1)


def complete_iou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """CIoU (arXiv 1911.08287) of boxes `[..., 4]`, centre and size, pair by pair: `[...]`."""
    low = torch.maximum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    high = torch.minimum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    inter = (high - low).clamp(min=0).prod(-1)
    iou = inter / (a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inter + eps)
    hull_low = torch.minimum(a[..., :2] - a[..., 2:] / 2, b[..., :2] - b[..., 2:] / 2)
    hull_high = torch.maximum(a[..., :2] + a[..., 2:] / 2, b[..., :2] + b[..., 2:] / 2)
    diagonal = (hull_high - hull_low).square().sum(-1) + eps
    distance = (a[..., :2] - b[..., :2]).square().sum(-1)
    angle = torch.atan(b[..., 2] / (b[..., 3] + eps)) - torch.atan(a[..., 2] / (a[..., 3] + eps))
    aspect = 4 / math.pi**2 * angle.square()
    with torch.no_grad():
        alpha = aspect / (aspect - iou + 1 + eps)
    return iou - distance / diagonal - alpha * aspect


def build_loss(
    anchors: Anchors,
    nc: int,
    *,
    auxiliary: bool,
    ota: bool = True,
    label_smoothing: float = 0.0,
    capacity: int | None = None,
    alone: bool = False,
) -> Loss:
    """The loss of a head: auxiliary OTA where it has auxiliary outputs, else OTA or plain."""
    if auxiliary:
        return Loss(
            anchors,
            nc,
            SimOTAAssigner(anchors, top=20, capacity=capacity),
            auxiliary_assigner=SimOTAAssigner(anchors, reach=1.0, top=20, capacity=capacity),
            label_smoothing=label_smoothing,
        )
    kind = SimOTAAssigner if ota else AnchorAssigner
    assigner = kind(anchors, capacity=capacity)
    return Loss(anchors, nc, assigner, label_smoothing=label_smoothing, alone=alone)


def head_loss(
    model: YOLOv7, *, plain: bool, lead_only: bool = False, label_smoothing: float = 0.0
) -> Loss:
    """The loss that fits a model's head, or that of its lead outputs, on this rank alone.

    Raises:
        UserError: the plain loss with auxiliary heads.
    """
    auxiliary = len(model.head.auxiliary) > 0 and not lead_only
    if plain and auxiliary:
        raise UserError(f"{model.variant.name} has auxiliary heads: leave out --plain-loss")
    anchors = Anchors(model.head.anchors.detach().cpu().clone(), model.head.strides)
    return build_loss(
        anchors,
        model.head.num_classes,
        auxiliary=auxiliary,
        ota=not plain,
        label_smoothing=label_smoothing,
        alone=lead_only,
    )
