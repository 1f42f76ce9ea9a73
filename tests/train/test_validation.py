import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.train.conftest import SIZE
from yolov7.boxes import cxcywh_to_xyxy, frame_table, in_frames
from yolov7.dataset import load_data
from yolov7.engine.choose import Runtime, open_network
from yolov7.engine.frames import to_input
from yolov7.evaluate import Settings, coco, evaluate, run
from yolov7.images import read_image
from yolov7.letterbox import letterbox, letterbox_geometry
from yolov7.model import create_model
from yolov7.train import validation
from yolov7.train.assigner import Anchors, pad_labels
from yolov7.train.distributed import Ranks
from yolov7.train.loss import LossWeights, head_loss
from yolov7.train.validation import Validation, fitness, letterboxed, undecoded, validate

WEIGHTS = LossWeights(0.05, 0.7, 0.3)


def together(world: int, work: Callable[[Ranks], Validation], patch: Any) -> list[Validation]:
    """What the ranks find, each of them a thread."""
    values: list[Any] = [None] * world
    barrier = threading.Barrier(world, timeout=60)

    def collect(value: Any, ranks: Ranks) -> list[Any]:
        values[ranks.rank] = value
        barrier.wait()
        found = list(values)
        barrier.wait()
        return found

    patch.setattr(validation, "collect", collect)
    patch.setattr(validation, "synchronise", lambda *_: None)
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(work, [Ranks(rank, world) for rank in range(world)]))


@pytest.mark.parametrize("world", [2, 4])
def test_ranks_together_find_what_one_finds(
    world: int, shapes: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight images in groups of three, and two classes: there are ranks without either."""
    for module in (run, validation):
        monkeypatch.setattr(module, "GROUP", 3)
    torch.manual_seed(0)
    model = create_model("yolov7-tiny", 2, width=0.125).eval()
    dataset = load_data(shapes, "train")
    matched: list[list[int]] = []

    def noted(dataset: Any, detections: Any, classes: list[int]) -> coco.Matching:
        matched.append(classes)
        return coco.match(dataset, detections, classes)

    monkeypatch.setattr(validation, "match", noted)

    def work(ranks: Ranks) -> Validation:
        settings = Settings(imgsz=SIZE, batch=3)
        return validate(model, dataset, settings, WEIGHTS, torch.device("cpu"), ranks)

    network = open_network(Runtime(weights=model, device="cpu"))
    whole = evaluate(network, dataset, Settings(imgsz=SIZE))
    alone = work(Ranks())
    assert sorted(matched.pop()) == [0, 1]
    for found in together(world, work, monkeypatch):
        assert found.evaluation.stats == alone.evaluation.stats == whole.stats
        assert found.evaluation.per_class == whole.per_class
        assert found.predictions.dataset.samples == dataset.samples
        assert found.losses == pytest.approx(alone.losses)
    assert sorted(matched) == [[0], [1]]


@pytest.mark.parametrize("variant", ["yolov7-tiny", "yolov7-w6"])
def test_raw_outputs_come_back_from_the_boxes(variant: str) -> None:
    torch.manual_seed(0)
    head = create_model(variant, 2, width=0.125, depth=0.34, form="deploy").head
    grids = [(256 // stride, 128 // stride) for stride in head.strides]
    raw = [2 * torch.randn(2, 3, *grid, 7) for grid in grids]
    anchors = Anchors(head.anchors, head.strides)
    for ours, expected in zip(undecoded(head.decode(raw), anchors, (256, 128)), raw, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-3)


def test_labels_lie_where_the_boxes_of_the_evaluation_do(shapes: Path) -> None:
    """In a letterbox with grey on all sides, the image in half of its size."""
    sample = replace(load_data(shapes, "val").samples[0], height=SIZE, width=SIZE)
    where = letterbox_geometry((SIZE // 2, SIZE // 2), (64, 96), scaleup=False)
    labels = letterboxed(sample, where.seen_from((SIZE, SIZE)))
    boxes = cxcywh_to_xyxy(labels[:, 1:] * torch.tensor([96, 64, 96, 64]))
    back = in_frames(boxes[None], frame_table([where.seen_from((SIZE, SIZE))]))[0]
    expected = torch.from_numpy(sample.labels.boxes)
    torch.testing.assert_close(back, expected, atol=1e-4, rtol=0)
    assert labels[:, 0].tolist() == sample.labels.classes.tolist()


@pytest.mark.parametrize("variant", ["yolov7-tiny", "yolov7-w6"])
def test_the_loss_is_that_of_the_outputs(variant: str, shapes: Path) -> None:
    """And every image is read once."""
    torch.manual_seed(0)
    model = create_model(variant, 2, width=0.125, depth=0.34).eval()
    with torch.no_grad():  # statistics that are not those of a new model
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]  # a tensor
    side = max(SIZE, model.stride)
    dataset = load_data(shapes, "train")
    settings = Settings(imgsz=side, batch=len(dataset.samples), preparation="square")
    images = [read_image(sample.path) for sample in dataset.samples]
    where = letterbox_geometry((SIZE, SIZE), side, stride=model.stride)
    boxed = [letterbox(image, where) for image in images]
    x = to_input(boxed, torch.device("cpu"), torch.float32)
    labels = pad_labels([letterboxed(sample, where) for sample in dataset.samples])
    with torch.no_grad():
        raw = model.lead_outputs(x)
    terms = WEIGHTS.weigh(head_loss(model, plain=True, lead_only=True)(raw, labels))
    expected = {f"val_{name}": pytest.approx(float(term), rel=1e-3) for name, term in terms.items()}
    result = validate(model, dataset, settings, WEIGHTS, torch.device("cpu"), Ranks())
    assert result.losses == expected
    assert result.stats == result.evaluation.stats | result.losses


def test_one_pass_over_the_images(shapes: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def watched(path: Path) -> Any:
        read.append(path)
        return read_image(path)

    monkeypatch.setattr(run, "read_image", watched)
    model = create_model("yolov7-tiny", 2, width=0.125).eval()
    dataset = load_data(shapes, "train")
    validate(model, dataset, Settings(imgsz=SIZE), WEIGHTS, torch.device("cpu"), Ranks())
    assert sorted(read) == sorted(sample.path for sample in dataset.samples)


def test_fitness() -> None:
    assert fitness({"AP": 0.5, "AP50": 0.7, "AR1": 1.0}) == pytest.approx(0.52)
    assert fitness({"AP": -1.0, "AP50": -1.0}) == 0  # nothing to find
