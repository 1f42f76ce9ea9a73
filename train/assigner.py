"""Which cells answer for which box: anchor matching and SimOTA, over a whole batch at once.

Labels are one padded tensor `[B, M, 5]`: class, centre x, centre y, width, height, the last four as
fractions of the image; class -1 marks padding. A *slot* is a place in an image's list of candidate
cells. Lists have a fixed length per level, so every shape is known before the device has computed
anything: nothing here waits for it, and with labels on the device and a `capacity` given a CUDA
graph can capture the whole.

Candidates are ordered by level, then neighbour, anchor and box; nothing is merged. Section 4 and
figure 5 of arXiv 2207.02696; SimOTA is from YOLOX (arXiv 2107.08430).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from yolov7.boxes import cxcywh_to_xyxy

RATIO_LIMIT = 4.0  # largest ratio between a side of a box and of its anchor
# Box-candidate pairs held at once, about 30 bytes each: a CPU's cache, or enough to fill a GPU.
PAIRS_PER_BLOCK = {"cpu": 1 << 19, "cuda": 1 << 23}


@dataclass(frozen=True)
class Anchors:
    """The geometry of a detection head.

    Args:
        sizes: `[nl, na, 2]` anchor width and height in pixels.
        strides: pixels per cell, per level.
    """

    sizes: Tensor
    strides: tuple[int, ...]
    _copies: dict[torch.device, Tensor] = field(default_factory=dict, repr=False, compare=False)

    def on(self, device: torch.device) -> Tensor:
        """The sizes on `device`, copied there once."""
        if device not in self._copies:
            self._copies[device] = self.sizes.detach().to(device, torch.float32)
        return self._copies[device]


@dataclass(frozen=True)
class Slots:
    """Candidate cells, or after assignment matches, of a batch; all levels side by side.

    Args:
        box: `[B, C]` index of the box among the image's labels.
        anchor, row, column: `[B, C]` the cell.
        mask: `[B, C]` whether the slot holds anything.
        sizes: slots of each level; their sum is C.
        overflow: `[B]` candidates that found no slot.
    """

    box: Tensor
    anchor: Tensor
    row: Tensor
    column: Tensor
    mask: Tensor
    sizes: tuple[int, ...]
    overflow: Tensor

    def to(self, device: torch.device) -> "Slots":
        """The same slots on `device`."""
        box, anchor, row, column, mask, overflow = (
            to_device(x, device)
            for x in (self.box, self.anchor, self.row, self.column, self.mask, self.overflow)
        )
        return Slots(box, anchor, row, column, mask, self.sizes, overflow)

    def levels(self) -> list["Slots"]:
        """The slots of each level; all of them carry the whole overflow."""
        fields = (self.box, self.anchor, self.row, self.column, self.mask)
        return [
            Slots(box, anchor, row, column, mask, (mask.shape[1],), self.overflow)
            for box, anchor, row, column, mask in zip(
                *(torch.split(x, list(self.sizes), 1) for x in fields), strict=True
            )
        ]

    @staticmethod
    def join(levels: list["Slots"]) -> "Slots":
        """Levels side by side, their overflow summed."""
        return Slots(
            box=torch.cat([level.box for level in levels], 1),
            anchor=torch.cat([level.anchor for level in levels], 1),
            row=torch.cat([level.row for level in levels], 1),
            column=torch.cat([level.column for level in levels], 1),
            mask=torch.cat([level.mask for level in levels], 1),
            sizes=tuple(size for level in levels for size in level.sizes),
            overflow=torch.stack([level.overflow for level in levels]).sum(0),
        )


def gather_cells(raw: Tensor, slots: Slots) -> Tensor:
    """Raw predictions of one level `[B, na, ny, nx, no]` at its slots: `[B, C, no]`."""
    image = torch.arange(len(raw), device=raw.device)[:, None]
    return raw[image, slots.anchor, slots.row, slots.column]


def gather_boxes(labels: Tensor, slots: Slots) -> Tensor:
    """Labels `[B, M, 5]` of the slots' boxes: `[B, C, 5]`."""
    return labels.gather(1, slots.box[..., None].expand(-1, -1, 5))


def scale_boxes(labels: Tensor, width: int, height: int) -> Tensor:
    """Boxes of labels `[..., 5]` in units of an image that is `width` x `height`: `[..., 4]`."""
    x, y, w, h = labels[..., 1:].unbind(-1)
    return torch.stack([x * width, y * height, w * width, h * height], -1)


def pad_labels(labels: Sequence[Tensor]) -> Tensor:
    """The labels `[n, 5]` of every image in one tensor `[B, M, 5]`, M >= 1, padded with -1."""
    one = labels[0].new_empty(1, 5)  # so that M is at least 1
    return pad_sequence([*labels, one], batch_first=True, padding_value=-1)[:-1]


class AnchorAssigner:
    """Every cell near a box of a similar anchor answers for it (the plain loss).

    Args:
        anchors: the head's geometry.
        reach: how far, in cells, a centre may lie from a neighbouring cell that is proposed as
            well: 0.5 (fine) or 1.0 (coarse).
        capacity: slots per image and level. None: as many as there are when the labels are on the
            CPU, where counting them is free, and as many as there could be elsewhere.
    """

    def __init__(
        self, anchors: Anchors, *, reach: float = 0.5, capacity: int | None = None
    ) -> None:
        self.anchors = anchors
        self.reach = reach
        self.capacity = capacity

    @torch.no_grad()
    def __call__(self, raw: list[Tensor], labels: Tensor) -> Slots:
        """Assign.

        Args:
            raw: the lead head's outputs, `[B, na, ny, nx, 5 + nc]` per level.
            labels: `[B, M, 5]`, on the CPU or on the outputs' device.

        Returns:
            Slots on the outputs' device.
        """
        shapes = [(level.shape[2], level.shape[3]) for level in raw]
        return self.propose(labels, shapes).to(raw[0].device)

    def propose(self, labels: Tensor, shapes: list[tuple[int, int]]) -> Slots:
        """Candidates for maps of the given (rows, columns), on the labels' device."""
        anchors = self.anchors.on(labels.device)
        return Slots.join(
            [
                self._propose_level(labels, sizes / stride, ny, nx)
                for sizes, stride, (ny, nx) in zip(
                    anchors, self.anchors.strides, shapes, strict=True
                )
            ]
        )

    def _propose_level(self, labels: Tensor, anchors: Tensor, ny: int, nx: int) -> Slots:
        """Candidates of one level; `anchors` [na, 2] in cells."""
        m, na, g = labels.shape[1], len(anchors), self.reach
        x, y, width, height = scale_boxes(labels, nx, ny).unbind(2)  # [B, M] cells
        ratio = torch.stack([width, height], 2)[:, None] / anchors[:, None]  # [B, na, M, 2]
        similar = torch.maximum(ratio, 1 / ratio).amax(3) < RATIO_LIMIT
        similar &= (labels[..., 0] >= 0)[:, None]

        # The cell of the centre, then of its neighbours to the left, up, right and down: [B, 5, M].
        near = [(d % 1 < g) & (d > 1) for d in (x, y, nx - x, ny - y)]
        proposed = torch.stack([torch.ones_like(near[0]), *near], 1)
        columns = torch.stack([x, x - g, x, x + g, x], 1).long().clamp(0, nx - 1)
        rows = torch.stack([y, y, y - g, y, y + g], 1).long().clamp(0, ny - 1)

        source, kept, overflow = self._compact((proposed[:, :, None] & similar[:, None]).flatten(1))
        neighbour, anchor, box = source // (m * na), source // m % na, source % m
        place = neighbour * m + box
        column, row = (cells.flatten(1).gather(1, place) for cells in (columns, rows))
        return Slots(box, anchor, row, column, kept, (source.shape[1],), overflow)

    def _compact(self, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Find each row's first `capacity` set entries `[B, L]`: index, mask, number left out."""
        b, length = mask.shape
        count = mask.sum(1)
        capacity = self.capacity
        if capacity is None:
            capacity = int(count.numpy().max()) if mask.device.type == "cpu" else length
        capacity = max(1, min(capacity, length))
        slot = torch.where(mask, mask.cumsum(1) - 1, capacity).clamp(max=capacity)
        index = torch.arange(length, device=mask.device).expand(b, -1)
        source = index.new_zeros(b, capacity + 1).scatter_(1, slot, index)[:, :capacity]
        kept = torch.arange(capacity, device=mask.device) < count[:, None]
        return source, kept, (count - capacity).clamp(min=0)


class SimOTAAssigner(AnchorAssigner):
    """Each box takes the few candidates that are cheapest for it by the lead predictions.

    Args:
        anchors: the head's geometry.
        reach: see `AnchorAssigner`.
        top: how many of a box's best IoUs are summed to give the number of its candidates.
        capacity: see `AnchorAssigner`.
    """

    def __init__(
        self,
        anchors: Anchors,
        *,
        reach: float = 0.5,
        top: int = 10,
        capacity: int | None = None,
    ) -> None:
        super().__init__(anchors, reach=reach, capacity=capacity)
        self.top = top

    @torch.no_grad()
    def __call__(self, raw: list[Tensor], labels: Tensor) -> Slots:
        """Assign; see `AnchorAssigner.__call__`."""
        slots = super().__call__(raw, labels)
        labels = to_device(labels, raw[0].device)
        rows = [gather_cells(*pair).float() for pair in zip(raw, slots.levels(), strict=True)]
        height, width = (self.anchors.strides[0] * side for side in raw[0].shape[2:4])
        truth = cxcywh_to_xyxy(scale_boxes(labels, width, height))  # [B, M, 4]
        class_cost = _class_cost(torch.cat(rows, 1), slots.mask)
        return self._select(slots, labels[..., 0], truth, self._decode(rows, slots), class_cost)

    def _decode(self, rows: list[Tensor], slots: Slots) -> Tensor:
        """Raw predictions at the slots to corners in pixels, 0 at empty ones: `[B, C, 4]`."""
        boxes = []
        for row, part, sizes, stride in zip(
            rows,
            slots.levels(),
            self.anchors.on(slots.mask.device),
            self.anchors.strides,
            strict=True,
        ):
            unit = row[..., :4].sigmoid() * 2
            cell = torch.stack([part.column, part.row], 2)
            centre = (unit[..., :2] - 0.5 + cell) * stride
            boxes.append(torch.cat([centre, unit[..., 2:] ** 2 * sizes[part.anchor]], 2))
        return cxcywh_to_xyxy(torch.cat(boxes, 1)).masked_fill_(~slots.mask[..., None], 0)

    def _select(
        self, slots: Slots, classes: Tensor, truth: Tensor, decoded: Tensor, class_cost: Tensor
    ) -> Slots:
        """Give every candidate at most one box; pairs are visited in blocks of boxes.

        Args:
            slots: the candidates.
            classes: `[B, M]`, -1 for padding.
            truth: `[B, M, 4]` corners of the boxes.
            decoded: `[B, C, 4]` corners of the predictions.
            class_cost: `[B, nc + 1, C]`, by class.
        """
        b, m = classes.shape
        c = slots.mask.shape[1]
        top = min(self.top, c)
        image = torch.arange(b, device=truth.device)[:, None]
        place = torch.arange(c, device=truth.device)
        cheapest = truth.new_full((b, c), torch.inf)
        cheapest_box = slots.box.new_zeros(b, c)
        takers, taker_sum = torch.zeros_like(cheapest_box), torch.zeros_like(cheapest_box)
        block = max(1, PAIRS_PER_BLOCK.get(truth.device.type, 1 << 19) // (b * c))
        for start in range(0, m, block):
            label = classes[:, start : start + block].long()
            iou = _pair_iou(truth[:, start : start + block], decoded)  # [B, m, C]
            wanted = iou.topk(top, sorted=True).values.sum(2).long().clamp(min=1)  # [B, m]
            cost = class_cost[image, label].add_(iou.add_(1e-8).log_(), alpha=-3)

            lowest, index = cost.min(1)
            better = lowest < cheapest
            cheapest = torch.where(better, lowest, cheapest)
            cheapest_box = torch.where(better, index + start, cheapest_box)

            chosen = _ranked(cost, place).topk(top, largest=False, sorted=True).values & 0xFFFFFFFF
            taken = torch.arange(top, device=truth.device) < wanted[..., None]
            taken &= (label >= 0)[..., None] & slots.mask[image[..., None], chosen]
            box = torch.arange(start, start + label.shape[1], device=truth.device)
            takers.scatter_add_(1, chosen.flatten(1), taken.flatten(1).long())
            taker_sum.scatter_add_(1, chosen.flatten(1), (taken * box[:, None]).flatten(1))
        owner = torch.where(takers > 1, cheapest_box, taker_sum)
        return replace(slots, box=owner, mask=takers > 0)


def _class_cost(rows: Tensor, mask: Tensor) -> Tensor:
    """BCE of sqrt(class x objectness) with each one-hot class, summed over classes.

    The sum against zeros depends on the candidate only; one class's difference is added to it.

    Args:
        rows: `[B, C, 5 + nc]` raw predictions.
        mask: `[B, C]` valid candidates; the others cost infinity.

    Returns:
        `[B, nc + 1, C]`; the last row, which class -1 picks, is infinity.
    """
    probability = (rows[..., 5:].sigmoid() * rows[..., 4:5].sigmoid()).sqrt_()
    negative = (1 - probability).log_().clamp_(min=-100)
    positive = probability.log_().clamp_(min=-100)
    none = negative.sum(2).neg_().masked_fill_(~mask, torch.inf)
    cost = (negative - positive).add_(none[..., None])
    return F.pad(cost.transpose(1, 2), (0, 0, 0, 1), value=torch.inf)


def _pair_iou(a: Tensor, b: Tensor) -> Tensor:
    """IoU of corners `[B, M, 4]` and `[B, C, 4]`: `[B, M, C]`; 0 for two empty boxes."""
    a, b = a[:, :, None], b[:, None]
    side = torch.minimum(a[..., 2], b[..., 2]).sub_(torch.maximum(a[..., 0], b[..., 0]))
    inter = torch.minimum(a[..., 3], b[..., 3]).sub_(torch.maximum(a[..., 1], b[..., 1]))
    inter.clamp_(min=0).mul_(side.clamp_(min=0))
    area_a, area_b = ((box[..., 2:] - box[..., :2]).prod(-1) for box in (a, b))
    union = torch.add(area_a, area_b, out=side).sub_(inter).clamp_(min=1e-9)
    return inter.div_(union)


def _ranked(cost: Tensor, place: Tensor) -> Tensor:
    """Distinct int64 keys in the order of (cost, place): the cost's bits above the place's."""
    bits = (cost + 0.0).view(torch.int32)  # + 0.0: no negative zero
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.long() << 32).add_(place)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """To `device`, without waiting for it (a copy from pageable memory would)."""
    if tensor.device == device:
        return tensor
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
