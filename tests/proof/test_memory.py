"""What `make memory` sees: each of these faults, planted in a kernel's copy, stops its launch."""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.test_conv import GATHER, TMA, assert_correct, call_of, layer_of, run
from tests.kernels.test_planted_faults import planted
from yolov7.kernels.conv import ConvCall, gather, launcher, parts

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif("ttsem" not in sys.modules, reason="runs under ttsem: make memory"),
]


def call(channels: int = 24) -> ConvCall:
    """A 3x3 layer whose tensors end where their memory does."""
    layer = layer_of(1, 5, 6, channels, 24, kernel=3)
    made = call_of(layer, torch.device("cpu"), torch.float16)
    return replace(made, x=made.x.clone(), out=made.out.clone())


def test_without_a_fault() -> None:
    for config in (GATHER, TMA):
        whole = call()
        run(whole, config)
        assert_correct(whole)


def with_parts(old: str, new: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch a gather kernel whose parts have a piece of source that is another.

    Triton reads what a kernel calls once, so the kernel has to be a copy, too.
    """
    monkeypatch.setitem(sys.modules, "planted_parts", planted(parts, old, new, folder))
    line = "from yolov7.kernels.conv.parts import ("
    broken = planted(gather, line, "from planted_parts import (", folder)
    monkeypatch.setattr(launcher, "conv_gather_kernel", broken.conv_gather_kernel)


def test_store_without_its_mask(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = "mask = (offs_m < shape.rows)[:, None] & (offs_n < shape.n_out)[None, :]\n    if UP"
    with_parts(old, old.replace("offs_m < shape.rows", "offs_m >= 0"), tmp_path, monkeypatch)
    with pytest.raises(Exception, match=r"writes \d+ element.* past the end"):
        run(call(), GATHER)


def test_load_before_the_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = "held = (row >= 0) & (row < shape.source_rows)"
    broken = planted(gather, old, "held = row < shape.source_rows", tmp_path)
    monkeypatch.setattr(launcher, "conv_gather_kernel", broken.conv_gather_kernel)
    with pytest.raises(Exception, match=r"reads \d+ element.* before the start"):
        run(call(), GATHER)


def test_descriptor_that_is_too_long(monkeypatch: pytest.MonkeyPatch) -> None:
    right = launcher._descriptors

    def longer(*arguments: Any) -> dict[str, Any]:
        made = right(*arguments)
        made["out_0"].shape = [made["out_0"].shape[0] + 8, *made["out_0"].shape[1:]]
        return made

    monkeypatch.setattr(launcher, "_descriptors", longer)
    with pytest.raises(Exception, match=r"writes \d+ element.* past the end"):
        run(call(), TMA)


def test_two_splits_on_one_partial_sum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = "row = split.to(tl.int64) * shape.rows + offs_m"
    with_parts(old, "row = 0 * split.to(tl.int64) + offs_m", tmp_path, monkeypatch)
    with pytest.raises(Exception, match=r"program instances .* both touch element"):
        run(call(64), replace(GATHER, split_k=4))
