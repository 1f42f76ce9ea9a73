from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from yolov7.head import Detect
from yolov7.kernels import decode as kernel
from yolov7.kernels.aot import compile_all, passed_limits
from yolov7.kernels.decode import SEGMENT, decode
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.nms import batched_nms
from yolov7.kernels.runtime import FLOATS

# Relative to the values: objectness and probabilities are O(1), boxes are pixels.
TOLERANCE = {"fp32": 1e-5, "fp16": 2e-3, "bf16": 2e-2}
STRIDES = [8, 16]


def make_head(
    precision: str,
    nc: int,
    anchors: int,
    device: torch.device,
    channels: tuple[int, ...] = (24, 63),
) -> dict[str, Any]:
    """Arguments of `decode`: two levels, channel slices of wider maps, three images."""
    random = torch.Generator().manual_seed(nc)
    layouts = [PitchedLayout.of(3, 9, 11), PitchedLayout.of(3, 5, 6)]
    dtype = FLOATS[precision]
    features, weights, biases = [], [], []
    for layout, c in zip(layouts, channels, strict=True):
        x = torch.randn(3, c + 2, layout.h, layout.w, generator=random)
        features.append(layout.from_nchw(x).to(device, dtype)[:, 1 : 1 + c])
        weight = torch.randn(anchors * (5 + nc), c, generator=random) / c**0.5
        weights.append(weight.to(device, dtype))
        biases.append(torch.randn(anchors * (5 + nc), generator=random).to(device))
    sizes = torch.rand(2, anchors, 2, generator=random).to(device) * 100
    return {
        "features": features,
        "weights": weights,
        "biases": biases,
        "anchors": sizes,
        "layouts": layouts,
        "strides": STRIDES,
        "exact": precision == "fp32",
    }


def reference(head: dict[str, Any], conf: float | None = None) -> tuple[Tensor, Tensor]:
    return kernel.decode_reference(
        head["features"], head["weights"], head["biases"], head["anchors"],
        sizes_of(head), STRIDES, True, conf,
    )  # fmt: skip


def sizes_of(head: dict[str, Any]) -> list[int]:
    return [side for layout in head["layouts"] for side in layout.sizes]


def threshold(dense: Tensor) -> float:
    """The middle of the widest gap between objectnesses about the median."""
    objectness = dense[..., 4].flatten().sort().values
    middle = objectness[len(objectness) // 3 : 2 * len(objectness) // 3]
    at = int(middle.diff().argmax())
    return float(middle[at] + middle[at + 1]) / 2


def test_reference_equals_the_head() -> None:
    head = Detect((24, 63), 3, [(10, 13, 16, 30), (30, 61, 62, 45)], STRIDES, implicit=False)
    layouts = [PitchedLayout.of(2, 9, 11), PitchedLayout.of(2, 5, 6)]
    images = [torch.randn(2, c, at.h, at.w) for c, at in zip((24, 63), layouts, strict=True)]
    parameters = [parameter.detach() for parameter in head.lead.parameters()]
    rows, counts = decode(
        [layout.from_nchw(x) for layout, x in zip(layouts, images, strict=True)],
        [weight.flatten(1) for weight in parameters[::2]],
        parameters[1::2],
        head.anchors,
        layouts,
        STRIDES,
        exact=True,
    )
    assert counts.shape == (2, 0)
    with torch.no_grad():
        torch.testing.assert_close(rows, head.decode(head.raw(images)), rtol=1e-5, atol=1e-4)


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("precision", "nc", "anchors"),
    [
        ("fp32", 3, 3),
        ("fp32", 1, 1),
        ("fp32", 130, 2),
        ("fp16", 3, 3),
        ("bf16", 2, 2),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_dense(precision: str, nc: int, anchors: int, kernel_device: torch.device) -> None:
    head = make_head(precision, nc, anchors, kernel_device)
    rows, _ = decode(**head)
    expected, _ = reference(head)
    assert rows.dtype == torch.float32
    tolerance = TOLERANCE[precision]
    torch.testing.assert_close(rows, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.interpreter
@pytest.mark.parametrize(("precision", "nc"), [("fp32", 3), ("fp32", 130), ("fp16", 1)])
@pytest.mark.usefixtures("poisoned_memory")
def test_candidates(precision: str, nc: int, kernel_device: torch.device) -> None:
    head = make_head(precision, nc, 2, kernel_device)
    dense, _ = reference(head)
    conf = threshold(dense)
    rows, counts = decode(**head, conf=conf)
    expected, expected_counts = reference(head, conf)
    assert torch.equal(counts, expected_counts)
    assert counts.sum() > len(dense)
    valid = (torch.arange(SEGMENT, device=counts.device) < counts[..., None]).flatten(1)
    tolerance = TOLERANCE[precision]
    torch.testing.assert_close(rows[valid], expected[valid], rtol=tolerance, atol=tolerance)
    if torch.are_deterministic_algorithms_enabled():
        assert rows[~valid].isnan().all()  # nothing is written beyond the counts


@pytest.mark.interpreter
def test_nms_takes_either_form(kernel_device: torch.device) -> None:
    head = make_head("fp32", 3, 2, kernel_device)
    dense, _ = decode(**head)
    conf = threshold(dense)
    rows, counts = decode(**head, conf=conf)
    options: dict[str, Any] = {"conf": conf, "iou": 0.3, "max_det": 60}
    expected = batched_nms(dense, **options)
    found = batched_nms(rows, **options, segment_counts=counts)
    assert expected.counts.min() > 0
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.interpreter
def test_nan_is_no_candidate(kernel_device: torch.device) -> None:
    head = make_head("fp32", 3, 2, kernel_device)
    head["features"][0].fill_(torch.nan)
    _, counts = decode(**head, conf=0.0)
    assert counts.sum() == 3 * 2 * 5 * 6  # all of the second level
    dense, _ = decode(**head)
    assert dense[:, : 2 * 9 * 11].isnan().all()


def test_empty_batch() -> None:
    layout = PitchedLayout.of(0, 4, 4)
    rows, counts = decode(
        [torch.empty(0, 8)], [torch.empty(16, 8)], [torch.empty(16)], torch.ones(1, 2, 2),
        [layout], [8], conf=0.5,
    )  # fmt: skip
    assert rows.shape == (0, 2 * SEGMENT, 8)
    assert counts.shape == (0, 2)


def test_operation() -> None:
    head = make_head("fp32", 3, 2, torch.device("cpu"))
    tensors: tuple[Any, ...] = tuple(head[name] for name in ("features", "weights", "biases"))
    arguments = (*tensors, head["anchors"], sizes_of(head), STRIDES, True)
    torch.library.opcheck(kernel._decode_op, (*arguments, None))
    # Rows beyond the counts are undefined, so results are not compared.
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(kernel._decode_op, (*arguments, 0.5), test_utils=checks)


def test_compiles_as_one_graph() -> None:
    head = make_head("fp32", 3, 2, torch.device("cpu"))
    compiled: Callable[..., Any] = torch.compile(decode, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**head)[0], decode(**head)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"features": []}, "0 features, 2 weights"),
        ({"strides": [8]}, "2 layouts, 1 strides"),
        ({"anchors": torch.ones(1, 2, 2)}, r"anchors are \[1, 2, 2\], not \[2, A, 2\]"),
        ({"anchors": torch.ones(2, 5, 2)}, r"16 outputs are not 5 anchors x \(5 \+ classes\)"),
        ({"biases": [torch.ones(16), torch.ones(15)]}, r"level 1: bias .* \[15\], not fp32 \[16\]"),
        ({"weights": [torch.ones(16, 23), torch.ones(16, 63)]}, r"level 0: weight \[16, 23\]"),
        ({"layouts": [PitchedLayout.of(3, 9, 11)] * 2}, r"features 1 \(\d+, 63\) is not"),
    ],
)
def test_wrong_input(change: dict[str, Any], message: str) -> None:
    head = make_head("fp32", 3, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match=message):
        decode(**{**head, **change})


def test_wrong_device() -> None:
    head = make_head("fp32", 3, 2, torch.device("cpu"))
    with pytest.raises(ValueError, match=r"devices differ: \['cpu', 'meta'\]"):
        decode(**{**head, "anchors": head["anchors"].to("meta")})


def test_wrong_types() -> None:
    head = make_head("fp32", 3, 2, torch.device("cpu"))
    with pytest.raises(
        ValueError, match=r"level 0: features torch\.float32, weight torch\.float16"
    ):
        decode(**{**head, "weights": [weight.half() for weight in head["weights"]]})


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "precision", "mma"),
    [
        ("sm_80", "fp16", "HMMA"),
        ("sm_89", "fp16", "HMMA"),
        ("sm_90", "bf16", "HGMMA"),
        ("sm_90", "fp16", "HGMMA"),
        ("sm_100", "fp16", "UTCHMMA"),
    ],
)
def test_compiles_within_the_limits(target: str, precision: str, mma: str) -> None:
    rows = list(compile_all(target, {"precision": precision}, only=["decode"]))
    assert [row.mma for row in rows] == [mma, mma]
    assert not [f"{row.shape}: {limit}" for row in rows for limit in passed_limits(row)]


@pytest.mark.aot
def test_fp32_compiles_within_the_limits() -> None:
    rows = list(compile_all("sm_90", {"precision": "fp32"}, only=["decode"]))
    assert [row.mma for row in rows] == ["HGMMA", "HGMMA", "", ""]  # TF32 and exact
    assert not [f"{row.shape}: {limit}" for row in rows for limit in passed_limits(row)]
