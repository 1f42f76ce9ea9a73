from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.conftest import SIZE
from yolov7.dataset import load_data
from yolov7.engine.choose import Runtime, open_network
from yolov7.evaluate import Settings, evaluate, run
from yolov7.model import create_model
from yolov7.train import validation
from yolov7.train.distributed import Ranks
from yolov7.train.loader import Batch
from yolov7.train.loss import LossWeights, head_loss
from yolov7.train.validation import ValidationLoss, fitness, validate


def test_ranks_together_find_what_one_finds(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight images in groups of three, of which the second rank takes the middle one."""
    for module in (run, validation):
        monkeypatch.setattr(module, "GROUP", 3)
    torch.manual_seed(0)
    model = create_model("yolov7-tiny", 2, width=0.125).eval()
    dataset = load_data(shapes, "train")
    settings = Settings(imgsz=SIZE)
    found: list[Any] = []

    def collect(value: Any, _: Ranks) -> list[Any]:
        found.append(value)
        return found

    monkeypatch.setattr(validation, "collect", collect)
    monkeypatch.setattr(validation, "synchronise", lambda *_: None)
    validate(model, dataset, settings, torch.device("cpu"), Ranks(0, 2))
    merged = validate(model, dataset, settings, torch.device("cpu"), Ranks(1, 2))
    assert [len(part) for part, _ in found] == [5, 3]
    network = open_network(Runtime(weights=model, device="cpu"))
    whole = evaluate(network, dataset, settings)
    assert merged.evaluation.stats == whole.stats
    assert merged.predictions.dataset.samples == dataset.samples


def test_more_ranks_than_groups(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(validation, "synchronise", lambda *_: None)
    monkeypatch.setattr(
        validation, "collect", lambda value, _: [value, ({0: torch.zeros(0, 6).numpy()}, [])]
    )
    model = create_model("yolov7-tiny", 2, width=0.125).eval()
    dataset = load_data(shapes, "train")
    result = validate(model, dataset, Settings(imgsz=SIZE), torch.device("cpu"), Ranks(1, 2))
    assert len(result.predictions.detections) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_network_has_the_training_precision_the_loss_fp32(dtype: torch.dtype) -> None:
    model = create_model("yolov7-w6", 2, width=0.125, depth=0.5)
    loss = head_loss(model, plain=True, lead_only=True)
    computed: set[torch.dtype] = set()
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda _, __, output: computed.add(output.dtype))
    autocast: list[bool] = []
    loss.register_forward_pre_hook(lambda *_: autocast.append(torch.is_autocast_enabled("cpu")))
    labels = torch.tensor([0, 0.5, 0.5, 0.4, 0.4]).repeat(2, 1, 1)
    batches = [Batch(torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8), labels)]
    weights = LossWeights(0.05, 0.7, 0.3)
    result = ValidationLoss(loss, weights, batches, dtype)(model, torch.device("cpu"), Ranks())
    assert (computed, autocast) == ({dtype}, [False])
    assert all(value > 0 for value in result.values())


def test_fitness() -> None:
    assert fitness({"AP": 0.5, "AP50": 0.7, "AR1": 1.0}) == pytest.approx(0.52)
    assert fitness({"AP": -1.0, "AP50": -1.0}) == 0  # nothing to find
