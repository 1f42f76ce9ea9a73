"""Ours beside other runtimes on the same exported file."""

from importlib.util import find_spec

import pytest

from bench.peers import compare
from yolov7.benchmark.clock import Pace
from yolov7.model import create_model


def test_all_contenders_agree_or_are_said_to_be_missing() -> None:
    pytest.importorskip("onnx")
    model = create_model("yolov7-tiny", 3, form="deploy", width=0.125).eval()
    found = list(compare(model, 32, Pace(0.0, 1, 1), compiled=False, beside=(19,)))
    rows = {row.body: row for row in found if "neighbour" not in row.case}
    assert rows["ours"].p50_ms > 0
    beside = {row.body for row in found if row.case.endswith("32 px, neighbour 19")}
    assert beside == {row.body for row in rows.values() if not row.missing}
    assert rows["ours, int8"].p50_ms > 0 or "VNNI" in rows["ours, int8"].missing
    for body in ("onnxruntime, fp32", "onnxruntime, int8", "openvino, fp32", "openvino, int8"):
        if find_spec(body.partition(",")[0]):
            assert rows[body].turns >= 1
        else:
            assert "is not installed" in rows[body].missing
