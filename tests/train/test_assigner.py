import subprocess
import sys
from contextlib import AbstractContextManager
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from yolov7.train import assigner as module
from yolov7.train.assigner import (
    AnchorAssigner,
    Anchors,
    SimOTAAssigner,
    Slots,
    gather_cells,
    pad_labels,
)

ANCHORS = Anchors(
    torch.tensor([[[10.0, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]]]), (8, 16)
)
NC = 5


def batch(
    seed: int, images: int = 2, boxes: int = 9, height: int = 64, width: int = 96
) -> tuple[list[Tensor], Tensor]:
    """Raw outputs, and labels with exact duplicates, centres on cell borders and an empty image."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    raw = [
        torch.randn(images, 3, height // s, width // s, 5 + NC, generator=generator)
        for s in ANCHORS.strides
    ]
    centre = (rand(images, boxes, 2) * 64).round() / 64
    classes = (rand(images, boxes, 1) * NC).floor()
    labels = torch.cat([classes, centre, 0.05 + rand(images, boxes, 2) / 2], 2)
    labels[0, 1] = labels[0, 0]
    labels[0, -2:] = 0
    labels[0, -2:, 0] = -1
    if images > 1:
        labels[-1] = 0
        labels[-1, :, 0] = -1
    return raw, labels


Match = tuple[int, int, int, int, int]  # level, anchor, row, column, box


def candidates_one_by_one(raw: list[Tensor], labels: Tensor, reach: float) -> list[Match]:
    """The rule as it is written down, for one image."""
    found = []
    for level, x in enumerate(raw):
        ny, nx = x.shape[1:3]
        sizes = ANCHORS.sizes[level] / ANCHORS.strides[level]
        for k, a, i in product(range(5), range(3), range(len(labels))):
            if labels[i, 0] < 0:
                continue
            cx, cy, w, h = (labels[i, 1:] * torch.tensor([nx, ny, nx, ny])).tolist()
            aw, ah = sizes[a].tolist()
            if max(w / aw, aw / w, h / ah, ah / h) >= 4:
                continue
            far_x, far_y = nx - cx, ny - cy
            proposed = (
                True,
                cx % 1 < reach and cx > 1,
                cy % 1 < reach and cy > 1,
                far_x % 1 < reach and far_x > 1,
                far_y % 1 < reach and far_y > 1,
            )
            if proposed[k]:
                dx, dy = ((0, 0), (1, 0), (0, 1), (-1, 0), (0, -1))[k]
                column = min(max(int(cx - dx * reach), 0), nx - 1)
                row = min(max(int(cy - dy * reach), 0), ny - 1)
                found.append((level, a, row, column, i))
    return found


def sim_ota_one_by_one(
    raw: list[Tensor], labels: Tensor, size: tuple[int, int], reach: float, top: int
) -> list[Match]:
    """SimOTA for one image, with a class axis and loops."""
    candidates = candidates_one_by_one(raw, labels, reach)
    real = [i for i in range(len(labels)) if labels[i, 0] >= 0]
    height, width = size
    cost, iou = (torch.full((len(labels), len(candidates)), v) for v in (torch.inf, 0.0))
    for c, (level, a, row, column, _) in enumerate(candidates):
        p = raw[level][a, row, column].double().sigmoid()
        stride = ANCHORS.strides[level]
        bx, by = (2 * p[0] - 0.5 + column) * stride, (2 * p[1] - 0.5 + row) * stride
        bw, bh = ((2 * p[2 + k]) ** 2 * ANCHORS.sizes[level][a, k] for k in range(2))
        for i in real:
            cls, *box = labels[i].double().tolist()
            x, y, w, h = (v * s for v, s in zip(box, (width, height) * 2, strict=True))
            iw = min(bx + bw / 2, x + w / 2) - max(bx - bw / 2, x - w / 2)
            ih = min(by + bh / 2, y + h / 2) - max(by - bh / 2, y - h / 2)
            inter = max(iw, 0) * max(ih, 0)
            iou[i, c] = inter / (bw * bh + w * h - inter)
            joint = (p[5:] * p[4]).sqrt()
            hot = torch.nn.functional.one_hot(torch.tensor(int(cls)), NC)
            entropy = torch.nn.functional.binary_cross_entropy(joint, hot.double(), reduction="sum")
            cost[i, c] = entropy - 3 * (iou[i, c] + 1e-8).log()
    owners: dict[int, list[int]] = {}
    for i in real:
        k = max(int(iou[i].sort(descending=True).values[:top].sum()), 1)
        for c in cost[i].sort(stable=True).indices[:k].tolist():
            owners.setdefault(c, []).append(i)
    owner = {c: b[0] if len(b) == 1 else int(cost[:, c].argmin()) for c, b in owners.items()}
    return [(*candidates[c][:4], owner[c]) for c in sorted(owner)]


def listed(slots: Slots, image: int) -> list[Match]:
    return [
        (level, *(int(field[image, c]) for field in (s.anchor, s.row, s.column, s.box)))  # type: ignore[misc]  # a star of four is not counted
        for level, s in enumerate(slots.levels())
        for c in range(s.mask.shape[1])
        if s.mask[image, c]
    ]


@pytest.mark.parametrize("reach", [0.5, 1.0], ids=["fine", "coarse"])
@pytest.mark.parametrize("seed", range(4))
def test_candidates_follow_the_written_rule(reach: float, seed: int) -> None:
    raw, labels = batch(seed)
    slots = AnchorAssigner(ANCHORS, reach=reach)(raw, labels)
    for image in range(len(labels)):
        expected = candidates_one_by_one([x[image] for x in raw], labels[image], reach)
        assert listed(slots, image) == expected


@pytest.mark.parametrize(("reach", "top"), [(0.5, 10), (1.0, 20)], ids=["fine", "coarse"])
@pytest.mark.parametrize("seed", range(4))
def test_sim_ota_follows_the_written_rule(reach: float, top: int, seed: int) -> None:
    raw, labels = batch(seed, images=3, height=96, width=64)
    slots = SimOTAAssigner(ANCHORS, reach=reach, top=top)(raw, labels)
    for image in range(len(labels)):
        expected = sim_ota_one_by_one([x[image] for x in raw], labels[image], (96, 64), reach, top)
        assert listed(slots, image) == expected


def test_blocks_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, labels = batch(0, boxes=30)
    whole = SimOTAAssigner(ANCHORS)(raw, labels)
    monkeypatch.setattr(module, "PAIRS_PER_BLOCK", {"cpu": 1})
    single = SimOTAAssigner(ANCHORS)(raw, labels)
    assert [listed(whole, 0), listed(whole, 1)] == [listed(single, 0), listed(single, 1)]


def test_capacity_that_suffices_changes_nothing() -> None:
    raw, labels = batch(1)
    exact = SimOTAAssigner(ANCHORS)(raw, labels)
    for capacity in (max(exact.sizes), 10_000):
        fixed = SimOTAAssigner(ANCHORS, capacity=capacity)(raw, labels)
        assert [listed(fixed, i) for i in range(2)] == [listed(exact, i) for i in range(2)]
        assert fixed.overflow.tolist() == [0, 0]


def test_overflow_is_counted_per_image() -> None:
    raw, labels = batch(2)
    exact, short = (AnchorAssigner(ANCHORS, capacity=c)(raw, labels) for c in (None, 7))
    assert short.sizes == (7, 7)
    lost = [len(listed(exact, i)) - len(listed(short, i)) for i in range(2)]
    assert short.overflow.tolist() == lost == [lost[0], 0]
    assert lost[0] > 0
    for full, kept in zip(exact.levels(), short.levels(), strict=True):
        assert listed(kept, 0) == listed(full, 0)[:7]


class NoSynchronisation(TorchDispatchMode):
    """Fails on the operators that read a value or a size from the device."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        assert func.overloadpacket.__name__ not in {
            "_local_scalar_dense",
            "nonzero",
            "masked_select",
            "unique",
            "_unique2",
            "equal",
            "repeat_interleave",
            "lift_fresh",  # torch.tensor(...): a copy from the host
        }, f"{func} waits for the device"
        return func(*args, **(kwargs or {}))


def no_synchronisation() -> AbstractContextManager[Any]:
    return NoSynchronisation()  # type: ignore[no-untyped-call]  # torch's class is untyped


@pytest.mark.parametrize("capacity", [None, 64])
def test_assignment_never_waits_for_the_device(capacity: int | None) -> None:
    raw, labels = batch(3)
    with no_synchronisation():
        SimOTAAssigner(ANCHORS, capacity=capacity)(raw, labels)
    with pytest.raises(AssertionError, match="waits"), no_synchronisation():
        int(labels.sum())


def test_labels_are_padded() -> None:
    two = torch.tensor([[7, 0.1, 0.2, 0.3, 0.4], [8, 0, 0, 1, 1]])
    one, none = torch.tensor([[1.0, 0, 0, 1, 1]]), torch.zeros(0, 5)
    labels = pad_labels([one, none, two])
    assert labels.shape == (3, 2, 5)
    assert labels[..., 0].tolist() == [[1, -1], [-1, -1], [7, 8]]
    assert torch.equal(labels[2], two)
    assert pad_labels([none] * 3).tolist() == [[[-1] * 5]] * 3


def test_gathered_cells() -> None:
    raw = torch.arange(2 * 3 * 4 * 5 * 6).view(2, 3, 4, 5, 6).float()
    anchor, row, column = (torch.tensor([[i], [i + 1]]) for i in range(3))
    mask = torch.ones(2, 1, dtype=torch.bool)
    slots = Slots(anchor, anchor, row, column, mask, sizes=(1,), overflow=torch.zeros(2))
    rows = gather_cells(raw, slots)
    assert torch.equal(rows[0, 0], raw[0, 0, 1, 2])
    assert torch.equal(rows[1, 0], raw[1, 1, 2, 3])


CROWD = """
import resource, torch
from yolov7.train.assigner import Anchors
from yolov7.train.loss import build_loss
torch.set_num_threads(1)
torch.manual_seed(0)
sizes = [[[12., 16], [19, 36], [40, 28]], [[36, 75], [76, 55], [72, 146]],
         [[142, 110], [192, 243], [459, 401]]]
loss = build_loss(Anchors(torch.tensor(sizes), (8, 16, 32)), 80, auxiliary=False)
box = torch.cat([torch.rand(1, 2000, 2), (8 + 56 * torch.rand(1, 2000, 2)) / 640], 2)
labels = torch.cat([torch.randint(80, (1, 2000, 1)).float(), box], 2)
raw = [(torch.randn(1, 3, s, s, 85) - 2).requires_grad_() for s in (80, 40, 20)]
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
start = peak()
loss.assigner(raw, labels)
assigned = peak()
terms = loss(raw, labels)
(terms["box"] + terms["classes"] + terms["objectness"]).backward()
print(assigned - start, peak() - start)
"""


def test_memory_of_a_crowd() -> None:
    """2000 boxes in one image: 0.1 GB measured for the assignment, 0.25 GB with the loss."""
    done = subprocess.run([sys.executable, "-c", CROWD], capture_output=True, text=True, check=True)
    assignment, whole = map(int, done.stdout.split())
    assert assignment < 0.3e9
    assert whole < 1e9
