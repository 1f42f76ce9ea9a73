import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.yolov7.data_sets import found, sample
from tests.yolov7.networks import StandIn
from yolov7.dataset import Dataset, Sample, load_data
from yolov7.engine.choose import Runtime, open_network
from yolov7.errors import UserError
from yolov7.evaluate import Predictions, Settings, evaluate, measure, predict, run
from yolov7.evaluate.pictures import save_pictures
from yolov7.evaluate.run import EVERYTHING

pytestmark = pytest.mark.usefixtures("cache_folder")


# which images share a canvas


def shapes(*sizes: tuple[int, int]) -> list[Sample]:
    return [sample([], [], size=size) for size in sizes]


@pytest.mark.parametrize(
    ("sizes", "imgsz", "stride", "canvas"),
    [
        ([(480, 640)], 320, 32, (256, 352)),
        ([(480, 640), (427, 640)], 640, 32, (512, 672)),
        ([(640, 480), (640, 427)], 640, 32, (672, 512)),
        ([(480, 640), (640, 480)], 640, 32, (672, 672)),
        ([(480, 640), (500, 500)], 640, 32, (672, 672)),
        ([(480, 640)], 1280, 64, (1024, 1344)),
    ],
)
def test_the_canvas_follows_the_extreme_aspect(
    sizes: list[tuple[int, int]], imgsz: int, stride: int, canvas: tuple[int, int]
) -> None:
    batches = run.plan_batches(shapes(*sizes), Settings(imgsz=imgsz), stride)
    assert [shape for _, shape in batches] == [canvas]


@pytest.mark.parametrize("batch", [1, 5, 32, 100])
def test_the_canvas_is_shared_by_32_neighbours_whatever_the_batch(batch: int) -> None:
    rng = np.random.default_rng(0)
    samples = shapes(*((int(h), int(w)) for h, w in rng.integers(300, 700, (70, 2))))
    batches = run.plan_batches(samples, Settings(batch=batch), 32)
    order = [index for indices, _ in batches for index in indices]
    aspects = [samples[index].height / samples[index].width for index in order]
    assert aspects == sorted(aspects)
    assert sorted(order) == list(range(70))
    assert max(len(indices) for indices, _ in batches) <= batch
    canvases = [canvas for indices, canvas in batches for _ in indices]
    for start in (0, 32, 64):
        low, high = aspects[start], aspects[start : start + 32][-1]
        sides = (high, 1) if high < 1 else (1, 1 / low) if low > 1 else (1, 1)
        expected = tuple(math.ceil(side * 20 + 0.5) * 32 for side in sides)
        assert set(canvases[start : start + 32]) == {expected}


def test_plain_letterbox_takes_the_smallest_canvas_and_square_always_the_whole() -> None:
    samples = shapes((480, 640), (640, 480), (480, 640))
    plans = {
        name: run.plan_batches(samples, Settings(imgsz=320, preparation=name), 32)
        for name in ("letterbox", "square")
    }
    assert plans["letterbox"] == [([0, 2], (256, 320)), ([1], (320, 256))]
    assert plans["square"] == [([0, 2, 1], (320, 320))]


# the run


COLOURS = {0: (0, 0, 255), 1: (255, 0, 0)}  # BGR of the classes


def coloured(folder: Path) -> Dataset:
    """Pictures of several shapes, each with one red (class 0) and one blue rectangle (class 1)."""
    samples = []
    for index, (height, width) in enumerate([(200, 260), (640, 480), (90, 300), (333, 333)]):
        image = np.full((height, width, 3), 114, np.uint8)
        boxes = [
            [0, 0, width // 2, height // 2],
            [width // 2 + 5, height // 2 + 5, width - 10, height],
        ]
        for label, (x1, y1, x2, y2) in enumerate(boxes):
            image[y1:y2, x1:x2] = COLOURS[label]
        path = folder / f"{index}.png"
        cv2.imwrite(str(path), image)
        samples.append(sample(boxes, [0, 1], image_id=index, path=path, size=(height, width)))  # type: ignore[arg-type]  # whole numbers are floats
    return Dataset(samples, ["red", "blue"], [0, 1])


def colours(images: Tensor) -> Tensor:
    """The bounding box of all red and of all blue pixels, confidence 0.9."""
    out = torch.zeros(len(images), 2, 7, dtype=images.dtype)
    for index, image in enumerate(images):
        for label, channel in enumerate((0, 2)):
            strong = image[channel] - image[1] > 0.5
            ys, xs = strong.any(1).nonzero()[:, 0], strong.any(0).nonzero()[:, 0]
            y1, y2, x1, x2 = int(ys[0]), int(ys[-1]) + 1, int(xs[0]), int(xs[-1]) + 1
            box = [(x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1]
            out[index, label] = torch.tensor([*box, 0.9, 1 - label, label])
    return out


colour_network = StandIn(colours)


@pytest.mark.parametrize("preparation", ["authors", "letterbox", "square"])
@pytest.mark.parametrize("imgsz", [160, 640])
def test_what_a_network_sees_is_mapped_back_to_the_image(
    tmp_path: Path, preparation: run.Preparation, imgsz: int
) -> None:
    dataset = coloured(tmp_path)
    settings = Settings(imgsz=imgsz, batch=2, preparation=preparation)
    predictions = predict(colour_network, dataset, settings)
    for one, boxes in zip(dataset.samples, predictions.detections, strict=True):
        pixel = max(one.height, one.width) / imgsz  # of the network, in pixels of the image
        rows = boxes[np.argsort(boxes[:, 5])]
        assert rows[:, 5].tolist() == [0, 1]
        np.testing.assert_allclose(rows[:, :4], one.labels.boxes, atol=1.6 * pixel)
        np.testing.assert_allclose(rows[:, 4], 0.9, rtol=1e-6)


def test_evaluate_joins_run_and_metric(tmp_path: Path) -> None:
    evaluation = evaluate(colour_network, coloured(tmp_path), Settings(imgsz=640))
    assert evaluation.stats["AP50"] == pytest.approx(1)
    assert evaluation.stats["AP"] > 0.9
    assert evaluation.images == 4
    assert set(evaluation.speed) == {"read", "pre", "network", "nms"}
    assert all(0 < value < 1000 for value in evaluation.speed.values())


def seen_by_the_network(dataset: Dataset, settings: Settings, dtype: torch.dtype) -> list[Tensor]:
    seen = []

    def network(images: Tensor) -> Tensor:
        seen.append(images.clone())
        return torch.zeros(len(images), 1, 7)

    predict(StandIn(network, dtype=dtype), dataset, settings)
    return seen


@pytest.mark.parametrize(("side", "method"), [(320, cv2.INTER_AREA), (960, cv2.INTER_LINEAR)])
def test_the_authors_way_scales_once_and_centres(tmp_path: Path, side: int, method: int) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (427, 640, 3), dtype=np.uint8)
    path = tmp_path / "x.png"
    cv2.imwrite(str(path), noise)
    dataset = Dataset([sample([], [], path=path, size=(427, 640))], ["a", "b"], [0, 1])
    (seen,) = seen_by_the_network(dataset, Settings(imgsz=side), torch.float32)
    height = int(427 * side / 640)
    scaled = cv2.resize(noise, (side, height), interpolation=method)
    canvas_h, canvas_w = seen.shape[2:]
    assert (canvas_h, canvas_w) == run.plan_batches(dataset.samples, Settings(imgsz=side), 32)[0][1]
    top, left = round((canvas_h - height) / 2 - 0.1), round((canvas_w - side) / 2 - 0.1)
    expected = np.full((canvas_h, canvas_w, 3), 114, np.uint8)
    expected[top : top + height, left : left + side] = scaled
    rgb = torch.from_numpy(expected[:, :, ::-1].copy()).permute(2, 0, 1) / 255
    assert torch.equal(seen[0], rgb)


def test_sides_that_were_rounded_are_mapped_back_each_by_its_own_scale(tmp_path: Path) -> None:
    """13 x 1000 becomes 2 x 160: rows shrink 6.5 times, columns 6.25 times."""
    path = tmp_path / "x.png"
    cv2.imwrite(str(path), np.zeros((13, 1000, 3), np.uint8))
    dataset = Dataset([sample([], [], path=path, size=(13, 1000))], ["a", "b"], [0, 1])
    network = constant_network([96, 16, 160, 2, 0.9, 1, 0])  # the image on its 32 x 192 canvas
    (boxes,) = predict(network, dataset, Settings(imgsz=160)).detections
    np.testing.assert_allclose(boxes[:, :4], [[0, 0, 1000, 13]], atol=1e-3)


def test_the_network_gets_batches_of_the_dtype_it_takes(tmp_path: Path) -> None:
    settings = Settings(imgsz=64, batch=3, preparation="square")
    seen = seen_by_the_network(coloured(tmp_path), settings, torch.bfloat16)
    assert [images.shape for images in seen] == [(3, 3, 64, 64), (1, 3, 64, 64)]
    assert {images.dtype for images in seen} == {torch.bfloat16}


def test_the_result_does_not_depend_on_the_batch(tmp_path: Path) -> None:
    dataset = coloured(tmp_path)
    one, four = (predict(colour_network, dataset, Settings(batch=n)).detections for n in (1, 4))
    for a, b in zip(one, four, strict=True):
        np.testing.assert_array_equal(a, b)


def constant_network(*rows: list[float]) -> StandIn:
    """Every image has the same rows: centre, size, objectness, probabilities of two classes."""
    return StandIn(lambda images: torch.tensor(rows).expand(len(images), -1, -1))


def boxes_of(tmp_path: Path, network: StandIn, **kept: Any) -> np.ndarray:
    """What is found in a picture of 333 x 333, at its own size."""
    dataset = coloured(tmp_path)
    only = Dataset(dataset.samples[3:], dataset.names, dataset.category_ids)
    options = Settings(imgsz=333, preparation="square", suppression=replace(EVERYTHING, **kept))
    return predict(network, only, options).detections[0]


def test_boxes_are_clipped_to_the_image(tmp_path: Path) -> None:
    boxes = boxes_of(tmp_path, constant_network([10, 320, 100, 100, 0.9, 1, 0]))
    np.testing.assert_allclose(boxes[:, :4], [[0, 270, 60, 333]], atol=1e-3)


def test_confidence_overlap_labels_and_number_of_boxes_are_as_set(tmp_path: Path) -> None:
    row = [100.0, 100, 50, 50]
    network = constant_network(
        [*row, 0.9, 0.8, 0.3], [102, 100, 50, 50, 0.8, 0.7, 0], [250, 250, 20, 20, 0.1, 0.1, 0]
    )
    assert len(boxes_of(tmp_path, network)) == 3  # both labels of the first, and the third
    assert len(boxes_of(tmp_path, network, iou=0.99)) == 4
    assert len(boxes_of(tmp_path, network, conf=0.05)) == 2
    assert len(boxes_of(tmp_path, network, max_det=1)) == 1


def test_nan_never_becomes_a_box(tmp_path: Path) -> None:
    nan = float("nan")
    assert len(boxes_of(tmp_path, constant_network([nan, 5, 5, 5, 0.9, 1, 0]))) == 0
    assert len(boxes_of(tmp_path, constant_network([5, 5, 5, 5, nan, nan, nan]))) == 0


def test_an_image_that_cannot_be_read_any_more_is_left_out_and_listed(tmp_path: Path) -> None:
    dataset = coloured(tmp_path)
    dataset.samples[0].path.unlink()
    cv2.imwrite(str(dataset.samples[2].path), np.zeros((5, 5, 3), np.uint8))
    predictions: Predictions = predict(colour_network, dataset, Settings(imgsz=320))
    assert [one.image_id for one in predictions.dataset.samples] == [1, 3]
    assert len(predictions.detections) == 2
    assert len(predictions.dataset.skipped) == 2
    assert any("2.png: has changed" in str(one) for one in predictions.dataset.skipped)
    for one in dataset.samples:
        one.path.unlink(missing_ok=True)
    with pytest.raises(UserError, match="no image can be read"):
        predict(colour_network, dataset, Settings(imgsz=320))


def test_a_network_with_other_classes_is_refused(tmp_path: Path) -> None:
    dataset = coloured(tmp_path)
    three = Dataset(dataset.samples, ["a", "b", "c"], [0, 1, 2])
    with pytest.raises(UserError, match="the network knows 2 classes, the data set has 3"):
        predict(colour_network, three, Settings(imgsz=320))


# pictures


@pytest.mark.parametrize("classes", [2, 25])
def test_pictures_are_drawn(tmp_path: Path, classes: int) -> None:
    names = [f"class {index}" for index in range(classes)]
    dataset = Dataset([sample([[0, 0, 20, 20], [50, 50, 90, 90]], [0, 1])], names, [])
    evaluation = measure(dataset, [found([0, 0, 20, 20, 0.9, 0], [50, 50, 90, 90, 0.8, 0])])
    paths = save_pictures(evaluation, tmp_path)
    assert sorted(path.stem for path in paths) == [
        "F1_curve", "PR_curve", "P_curve", "R_curve", "confusion_matrix"
    ]  # fmt: skip
    for path in paths:
        image = cv2.imread(str(path))
        assert image is not None
        assert image.std() > 10  # something is on it


def test_without_a_box_only_the_matrix_is_drawn(tmp_path: Path) -> None:
    evaluation = measure(Dataset([sample([], [])], ["a"], [0]), [found()])
    assert [path.stem for path in save_pictures(evaluation, tmp_path)] == ["confusion_matrix"]


# the authors' figures


AUTHORS = {
    ("authors", "test"): (0.48295, 0.84159, 0.51417, 0.64099),
    ("authors", "val"): (0.50783, 0.84912, 0.53487, 0.65568),
    ("letterbox", "test"): (0.47999, 0.82430, 0.50578, 0.64342),
    ("letterbox", "val"): (0.50459, 0.84515, 0.53725, 0.65450),
}


@pytest.mark.parametrize(("preparation", "split"), list(AUTHORS))
def test_the_authors_own_evaluation_is_reproduced(
    data_dir: Path, reference_dir: Path, preparation: run.Preparation, split: str
) -> None:
    weights = reference_dir / "checkpoints" / "blood-cells-tiny.pt"
    if not weights.exists():
        pytest.skip("YOLOV7_REFERENCE names no folder with checkpoints/blood-cells-tiny.pt")
    network = open_network(Runtime(weights=weights, device="cpu", precision="fp32"))
    dataset = load_data(data_dir / "blood-cells", split)
    stats = evaluate(network, dataset, Settings(imgsz=320, preparation=preparation)).stats
    got = [stats[name] for name in ("AP", "AP50", "AP75", "AR100")]
    assert got == pytest.approx(AUTHORS[preparation, split], abs=5e-4)


@pytest.mark.parametrize("split", ["test", "val"])
def test_embedded_weights_reach_what_was_kept(data_dir: Path, split: str) -> None:
    from bench.accuracy import FIGURES, kept

    network = open_network(Runtime(device="cpu", precision="fp32"))
    dataset = load_data(data_dir / "blood-cells", split)
    stats = evaluate(network, dataset, Settings(imgsz=320)).stats
    row = kept()[f"the embedded weights, {split}"]
    assert [stats[name] for name in FIGURES] == pytest.approx([row[n] for n in FIGURES], abs=5e-4)
