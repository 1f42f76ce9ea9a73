"""Loss, gradients and matches beside the authors' numbers."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.conftest import reference_folder
from yolov7.train.assigner import Anchors, Slots, pad_labels
from yolov7.train.loss import Loss, LossWeights, build_loss

CASES = sorted((reference_folder() / "loss").glob("*.npz"))
FORMS = ("plain", "ota", "ota_aux")


def cases() -> list[Any]:
    return [
        pytest.param(path, form, id=f"{path.stem}-{form}")
        for path in CASES
        for form in FORMS
        if f"{form}_loss" in np.load(path).files
    ]


def head(reference_dir: Path, variant: str) -> Anchors:
    path = reference_dir / "architectures" / f"{variant}.json"
    spec = json.loads(path.read_text())["training"]
    sizes = torch.tensor(spec["anchors_px"], dtype=torch.float32).view(len(spec["strides"]), -1, 2)
    return Anchors(sizes, tuple(map(int, spec["strides"])))


def build(reference_dir: Path, data: Any, form: str) -> tuple[Loss, LossWeights]:
    hyp = json.loads(str(data["hyp"]))
    assert hyp["cls_pw"] == hyp["obj_pw"] == 1  # positives count as negatives do
    loss = build_loss(
        head(reference_dir, str(data["variant"])),
        int(data["nc"]),
        auxiliary=form == "ota_aux",
        ota=form != "plain",
        label_smoothing=hyp["label_smoothing"],
    )
    return loss, LossWeights(hyp["box"], hyp["obj"], hyp["cls"])


def outputs(data: Any, form: str) -> list[torch.Tensor]:
    count = sum(name.startswith(f"{form}_grad") for name in data.files)
    return [torch.from_numpy(data[f"pred{i}"]).requires_grad_() for i in range(count)]


def padded(data: Any, batch: int) -> torch.Tensor:
    targets = torch.from_numpy(data["targets"])
    return pad_labels([targets[targets[:, 0] == image, 1:] for image in range(batch)])


@pytest.mark.parametrize(("path", "form"), cases())
def test_loss_and_gradients(reference_dir: Path, path: Path, form: str) -> None:
    data = np.load(path)
    raw = outputs(data, form)
    loss, weights = build(reference_dir, data, form)
    batch = len(raw[0])
    items = weights.weigh(loss(raw, padded(data, batch)))
    total = torch.stack(list(items.values())).sum() * batch
    total.backward()

    got = [items["box"], items["objectness"], items["classes"], total / batch]
    torch.testing.assert_close(
        torch.stack(got).detach(), torch.from_numpy(data[f"{form}_items"]), rtol=1e-5, atol=1e-9
    )
    torch.testing.assert_close(
        total.detach(), torch.from_numpy(data[f"{form}_loss"])[0], rtol=1e-5, atol=0
    )
    for level, x in enumerate(raw):
        expected = torch.from_numpy(data[f"{form}_grad{level}"])
        assert x.grad is not None
        error = (x.grad - expected).abs().max() / expected.abs().max()
        assert error < 1e-4, f"gradient of level {level}: {error:.2e} of its largest magnitude"


def test_there_are_cases() -> None:
    assert {case.values[1] for case in cases()} == set(FORMS)


def as_multiset(cells: NDArray[Any], targets: NDArray[Any]) -> Counter[tuple[float, ...]]:
    rows = np.concatenate([cells, np.round(targets.astype(np.float64), 6)], 1)
    return Counter(map(tuple, rows.tolist()))


def matches(slots: Slots, labels: torch.Tensor) -> tuple[NDArray[Any], NDArray[Any]]:
    image, place = slots.mask.nonzero(as_tuple=True)
    cells = torch.stack(
        [image, *(x[image, place] for x in (slots.anchor, slots.row, slots.column))]
    )
    label = labels[image, slots.box[image, place]]
    return cells.T.numpy(), torch.cat([image[:, None].float(), label], 1).numpy()


@pytest.mark.parametrize(("path", "form"), [case for case in cases() if case.values[1] != "plain"])
def test_matches(reference_dir: Path, path: Path, form: str) -> None:
    data = np.load(path)
    raw = [x.detach() for x in outputs(data, form)]
    loss, _ = build(reference_dir, data, form)
    labels = padded(data, len(raw[0]))
    kinds = {"match": loss.assigner}
    if loss.auxiliary_assigner is not None:
        kinds["coarse_match"] = loss.auxiliary_assigner
    lead = raw[: len(raw) // len(kinds)]
    for kind, assigner in kinds.items():
        slots = assigner(lead, labels)
        assert int(slots.overflow.sum()) == 0
        for level, part in enumerate(slots.levels()):
            expected = data[f"{form}_{kind}{level}"], data[f"{form}_{kind}_target{level}"]
            got = matches(part, labels)
            assert as_multiset(*got) == as_multiset(*expected), f"{kind}, level {level}"
