import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.conftest import reference_folder
from tests.kernels import COMPILED
from yolov7.kernels import nms
from yolov7.kernels.aot import compile_all, passed_limits
from yolov7.kernels.nms import Detections, batched_nms, nms_reference
from yolov7.kernels.runtime import INTERPRET

# Of two images what their letterboxes added left and above, their scale, the frame's size.
FRAMES = torch.tensor(
    [
        [[7.0, 5, 7, 5], [0.7, 1.3, 0.7, 1.3], [230.0, 170, 230, 170]],
        [[0.0] * 4, [1.0] * 4, [9e3] * 4],
    ]
)

OPTIONS: dict[str, dict[str, Any]] = {
    "best class": {},
    "multi-label": {"multi_label": True, "conf": 0.01},
    "agnostic": {"agnostic": True, "iou": 0.3},
    "some classes": {"classes": torch.tensor([2, 0])},
    "no classes": {"classes": torch.tensor([], dtype=torch.int64)},
    "one box": {"max_det": 1},
    "everything": {"conf": 0.0, "iou": 1.0, "multi_label": True},
    "nothing": {"conf": 1.0},
    "in frames": {"frames": FRAMES},
    "negative zero": {"conf": -0.0, "max_det": 5},
}


def predictions(batch: int, rows: int, nc: int, seed: int = 0) -> Tensor:
    """Boxes around few centres, so that many overlap; probabilities over 0..1, many equal."""
    random = torch.Generator().manual_seed(seed)
    prediction = torch.rand(batch, rows, 5 + nc, generator=random)
    centres = torch.rand(5, 2, generator=random) * 300
    prediction[..., :2] = centres[torch.randint(5, (batch, rows), generator=random)]
    prediction[..., :2] += 20 * torch.rand(batch, rows, 2, generator=random)
    prediction[..., 2:4] = 40 + 20 * prediction[..., 2:4]
    prediction[..., 4:] = (prediction[..., 4:] * 16).round() / 16
    return prediction


def reference(prediction: Tensor, **options: Any) -> Detections:
    arguments: dict[str, Any] = {
        "segment_counts": None,
        "classes": None,
        "frames": None,
        "conf": 0.25,
        "iou": 0.45,
        "multi_label": False,
        "agnostic": False,
        "max_det": 300,
        "max_candidates": 30000,
        **options,
    }
    return Detections(*nms_reference(prediction, **arguments))


def assert_same(found: Detections, expected: Detections) -> None:
    for name, a, b in zip(Detections._fields, found, expected, strict=True):
        assert torch.equal(a.cpu(), b.cpu()), name


@pytest.fixture(scope="module")
def small_blocks() -> Iterator[None]:
    """Few bins, small groups and no slack: every loop runs on small inputs."""
    config = {"BLOCK": 16, "SCAN": 32, "SEGMENTS": 8, "ELEMENTS": 64, "LOG_BINS": 4}
    config["num_warps"] = 4
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nms, "CONFIG", config)
        patch.setattr(nms, "SLACK", 0)
        yield


def scan_one_by_one(prediction: Tensor, conf: float, iou: float, max_det: int) -> list[list[float]]:
    """The definition, one candidate at a time: x1, y1, x2, y2, score, class of every kept box."""
    candidates = []
    for x, y, w, h, objectness, *probabilities in prediction.numpy().astype(np.float32):
        scores = [objectness * p for p in probabilities] if len(probabilities) > 1 else [objectness]
        label = int(np.argmax(scores))
        if objectness > conf and scores[label] > conf:
            half_w, half_h = w / 2, h / 2
            corners = (x - half_w, y - half_h, x + half_w, y + half_h)
            candidates.append((*corners, scores[label], np.float32(label)))
    candidates.sort(key=lambda candidate: -candidate[4])
    kept: list[tuple[np.float32, ...]] = []
    for candidate in candidates:
        overlaps = False
        for other in kept:
            shift, other_shift = candidate[5] * np.float32(4096), other[5] * np.float32(4096)
            a = [side + shift for side in candidate[:4]]
            b = [side + other_shift for side in other[:4]]
            width = max(min(a[2], b[2]) - max(a[0], b[0]), np.float32(0))
            height = max(min(a[3], b[3]) - max(a[1], b[1]), np.float32(0))
            areas = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1])
            overlaps |= bool(width * height / (areas - width * height) > np.float32(iou))
        if not overlaps:
            kept.append(candidate)
    return [[float(value) for value in box] for box in kept[:max_det]]


@settings(max_examples=25)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 4), st.sampled_from([0.2, 0.5]))
def test_reference_scans_one_by_one(seed: int, rows: int, nc: int, iou: float) -> None:
    prediction = predictions(1, rows, nc, seed)
    found = reference(prediction, conf=0.25, iou=iou, max_det=7)
    expected = scan_one_by_one(prediction[0], 0.25, iou, 7)
    assert found.counts.tolist() == [len(expected)]
    assert found.boxes[0, : len(expected)].tolist() == expected


def test_best_candidates_fill_the_capacity() -> None:
    prediction = predictions(1, 200, 3)
    everything = reference(prediction, conf=0.1, iou=1.0, multi_label=True, max_det=1000)
    bounded = reference(
        prediction, conf=0.1, iou=1.0, multi_label=True, max_det=1000, max_candidates=100
    )
    assert bounded.counts.tolist() == [100]
    assert bounded.overflow.tolist() == [everything.counts.item() - 100]
    assert torch.equal(bounded.boxes[:, :100], everything.boxes[:, :100])


def test_nan_is_never_a_box() -> None:
    prediction = predictions(1, 12, 3)
    prediction[..., 4:] = 0.9
    for row, column in enumerate(range(8)):
        prediction[0, row, column] = float("nan")
    prediction[0, 8, 2] = float("inf")
    prediction[0, 9, 5:] = float("nan")
    found = batched_nms(prediction, iou=1.0)
    assert found.counts.tolist() == [5]  # rows 5, 6 and 7 by another class, 10 and 11
    assert found.boxes.isfinite().all()


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in OPTIONS),
        ("best class", torch.float16),
        ("multi-label", torch.bfloat16),
    ],
)
@pytest.mark.usefixtures("small_blocks", "poisoned_memory")
def test_kernel_options(name: str, dtype: torch.dtype, kernel_device: torch.device) -> None:
    prediction = predictions(2, 63, 3).to(dtype).to(kernel_device)
    options = OPTIONS[name]
    options = {k: v.to(kernel_device) if isinstance(v, Tensor) else v for k, v in options.items()}
    assert_same(batched_nms(prediction, **options), reference(prediction, **options))


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_blocks")
@settings(max_examples=12)
@given(st.data())
def test_kernel_on_any_shape(kernel_device: torch.device, data: st.DataObject) -> None:
    draw = data.draw
    prediction = predictions(
        draw(st.integers(0, 2)), draw(st.integers(0, 70)), draw(st.integers(1, 5)),
        draw(st.integers(0, 10**6)),
    ).to(kernel_device)  # fmt: skip
    options: dict[str, Any] = {
        "conf": draw(st.sampled_from([0.0, 0.1, 0.5])),
        "iou": draw(st.sampled_from([0.0, 0.25, 0.45, 0.9])),
        "multi_label": draw(st.booleans()) and prediction.shape[2] > 6,
        "agnostic": draw(st.booleans()),
        "max_det": draw(st.integers(1, 50)),
        "max_candidates": draw(st.integers(1, 100)),
    }
    assert_same(batched_nms(prediction, **options), reference(prediction, **options))


@pytest.mark.interpreter
@pytest.mark.parametrize("score", [0.5, 1.0, 3.0, float("inf")])
@pytest.mark.usefixtures("small_blocks", "poisoned_memory")
def test_kernel_capacity_among_equals(score: float, kernel_device: torch.device) -> None:
    # All candidates fall into one bin, then into one score: the rows with the lower index win.
    prediction = predictions(2, 100, 2)
    prediction[..., 4], prediction[..., 5] = score, 1.0
    prediction[..., 6] = 0.75
    prediction = prediction.to(kernel_device)
    options: dict[str, Any] = {
        "iou": 0.9,
        "multi_label": True,
        "max_candidates": 120,
        "max_det": 200,
    }
    found = batched_nms(prediction, **options)
    assert_same(found, reference(prediction, **options))
    assert found.overflow.tolist() == [80, 80]


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy, in the interpreter
def test_kernel_never_boxes_nan(kernel_device: torch.device) -> None:
    prediction = predictions(1, 40, 3)
    cells = itertools.product(range(8), (float("nan"), float("inf"), -float("inf")))
    for row, (column, value) in enumerate(cells):
        prediction[0, row, column] = value
    prediction = prediction.to(kernel_device)
    found = batched_nms(prediction, iou=0.9)
    assert_same(found, reference(prediction, iou=0.9))
    assert found.boxes[..., :4].isfinite().all()


@pytest.mark.interpreter
@pytest.mark.usefixtures("poisoned_memory")
def test_kernel_reads_segments(kernel_device: torch.device) -> None:
    prediction = predictions(2, 60, 3).to(kernel_device)
    counts = torch.tensor([[12, 0, 1, 12, 5], [0, 0, 0, 0, 0]], dtype=torch.int32)
    counts = counts.to(kernel_device)
    found = batched_nms(prediction, conf=0.01, segment_counts=counts)
    assert_same(found, reference(prediction, conf=0.01, segment_counts=counts))
    rows = [12 * segment + row for segment, n in enumerate([12, 0, 1, 12, 5]) for row in range(n)]
    assert_same(
        Detections(*(part[:1] for part in found)), reference(prediction[:1, rows], conf=0.01)
    )


@pytest.mark.interpreter
@pytest.mark.usefixtures("small_blocks", "poisoned_memory")
@pytest.mark.parametrize("length", [1, 3, 16])
def test_kernel_finds_the_rows_of_any_counts(length: int, kernel_device: torch.device) -> None:
    # More segments than programs take at once, empty and full ones, and counts that are none.
    prediction = predictions(2, 240, 3).to(kernel_device)
    random = torch.Generator().manual_seed(length)
    counts = torch.randint(-1, length + 2, (2, 240 // length), generator=random, dtype=torch.int32)
    counts[:, 20 // length : 120 // length] = 0
    counts = counts.to(kernel_device)
    options: dict[str, Any] = {"conf": 0.1, "segment_counts": counts, "max_candidates": 60}
    for multi_label in (False, True):
        options["multi_label"] = multi_label
        assert_same(batched_nms(prediction, **options), reference(prediction, **options))


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "case", sorted((reference_folder() / "nms").glob("*.npz")), ids=lambda case: case.stem
)
def test_kernel_gives_stored_boxes(case: Path, kernel_device: torch.device) -> None:
    with np.load(case) as data:
        prediction = torch.from_numpy(data["prediction"]).to(kernel_device)
        if INTERPRET and prediction.numel() > 30_000:
            pytest.skip("takes up to a minute in the interpreter")
        names = {"conf_thres": "conf", "iou_thres": "iou"}
        given = json.loads(str(data["opt0"]))
        found = batched_nms(prediction, **{names.get(k, k): v for k, v in given.items()})
        for image in range(len(prediction)):
            expected = data[f"opt0_image{image}"]
            assert np.array_equal(found.boxes[image, : found.counts[image]].cpu(), expected)


@pytest.mark.interpreter
def test_kernel_on_any_strides(kernel_device: torch.device) -> None:
    prediction = predictions(2, 40, 6).to(kernel_device)
    classes = torch.tensor([0, 5, 1, 4], device=kernel_device)[::2]
    counts = torch.tensor([[2, 20], [7, 3]], dtype=torch.int32, device=kernel_device).T
    options: dict[str, Any] = {"conf": 0.01, "classes": classes, "segment_counts": counts}
    assert_same(batched_nms(prediction, **options), reference(prediction, **options))


def test_not_contiguous() -> None:
    prediction = predictions(2, 8, 40).transpose(1, 2)[:, :, :8]
    assert not prediction.is_contiguous()
    assert_same(batched_nms(prediction), reference(prediction.contiguous()))


@pytest.mark.parametrize("shape", [(0, 10, 85), (2, 0, 85), (1, 7, 6)], ids=str)
def test_empty(shape: tuple[int, int, int]) -> None:
    found = batched_nms(torch.zeros(shape))
    assert found.boxes.shape == (shape[0], 300, 6)
    assert not found.boxes.any()
    assert found.counts.tolist() == found.overflow.tolist() == [0] * shape[0]


def test_operation() -> None:
    arguments = (
        predictions(2, 30, 3),
        None,
        torch.tensor([1]),
        FRAMES,
        0.2,
        0.5,
        True,
        False,
        20,
        50,
    )
    torch.library.opcheck(nms.nms_op, arguments)


def test_compiles_as_one_graph() -> None:
    compiled = torch.compile(batched_nms, fullgraph=True, backend="aot_eager")
    prediction = predictions(2, 30, 3)
    assert_same(compiled(prediction, conf=0.1), batched_nms(prediction, conf=0.1))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 85), {}, r"prediction must be \[B, N, 5 \+ nc\], got \[3, 85\]"),
        ((1, 3, 5), {}, r"got \[1, 3, 5\]"),
        ((1, 3, 85), {"conf": 1.5}, "conf and iou must lie in 0..1, got 1.5"),
        ((1, 3, 85), {"iou": -0.1}, "got 0.25 and -0.1"),
        ((1, 3, 85), {"max_det": 0}, "max_det=0"),
        ((1, 3, 85), {"frames": FRAMES}, r"fp32 \[1, 3, 4\], got torch.float32 \[2, 3, 4\]"),
        ((1, 3, 85), {"classes": torch.zeros(2)}, r"integers \[k\], got torch.float32 \[2\]"),
        (
            (2, 9, 85),
            {"segment_counts": torch.zeros(2, 2, dtype=torch.int32)},
            r"torch.int32 \[2, 2\] for a prediction \[2, 9, 85\]",
        ),
    ],
)
def test_wrong_input(shape: tuple[int, ...], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        batched_nms(torch.zeros(shape), **options)


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("classes", torch.zeros(3, dtype=torch.int32)),
        ("segment_counts", torch.zeros(1, 3, dtype=torch.int32)),
        ("frames", torch.zeros(1, 3, 4)),
    ],
)
def test_wrong_device(name: str, other: Tensor) -> None:
    options: dict[str, Any] = {name: other.to("meta")}
    with pytest.raises(ValueError, match=f"{name} on meta, prediction on cpu"):
        batched_nms(torch.zeros(1, 3, 85), **options)


def test_wrong_dtype() -> None:
    with pytest.raises(ValueError, match=r"fp32, fp16 or bf16, got torch\.int32"):
        batched_nms(torch.zeros(1, 3, 85, dtype=torch.int32))


@pytest.mark.aot
@pytest.mark.parametrize("target", COMPILED)
def test_compiles_within_the_limits(target: str) -> None:
    rows = list(compile_all(target, {}, only=["nms"]))
    assert {row.kernel for row in rows} == {
        f"nms_{name}_kernel" for name in ("histogram", "select", "scatter", "greedy")
    }
    assert not [f"{row.shape}: {limit}" for row in rows for limit in passed_limits(row)]
