"""`yolov7 aot` and `yolov7 tune`."""

import json
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from yolov7.cli import main, tune
from yolov7.kernels import aot
from yolov7.kernels.aot import load_table
from yolov7.kernels.architectures import ARCHITECTURES
from yolov7.kernels.conv import ConvConfig, ConvLaunch, Launch
from yolov7.kernels.conv.cases import Record, layer_of, meta_call
from yolov7.kernels.conv.config import Entry
from yolov7.kernels.runtime import INTERPRET

LAUNCH = ConvLaunch([meta_call(layer_of(Record(128, 128, 3, 1, 80, 80), 1), torch.float16)])
COMPILES = pytest.mark.skipif(INTERPRET, reason="compiles nothing under TRITON_INTERPRET=1")


@pytest.fixture
def one_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer to compile."""

    def cases(*_: object) -> Iterator[tuple[str, Callable[[], None]]]:
        yield "one layer", lambda: LAUNCH.prepare()()

    monkeypatch.setattr(aot, "kernel_cases", cases)


@COMPILES
@pytest.mark.usefixtures("one_layer")
def test_aot_prints_and_writes_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert main(["aot", "--target", "sm_90", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data["totals"] == {"rows": 1, "over_limit": 0}
    expected = "kernel shape target config registers shared_bytes local_bytes mma tma_loads"
    assert set(expected.split()) | {"instructions"} <= data["rows"][0].keys()
    assert load_table(path)[1][0].kernel == "conv_tma_kernel"
    assert "one layer" in capsys.readouterr().out


@COMPILES
@pytest.mark.usefixtures("one_layer")
def test_aot_fails_over_a_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(ARCHITECTURES, (9, 0), replace(ARCHITECTURES[9, 0], shared_bytes=1000))
    assert main(["aot"]) == 1
    assert "over the limit: conv_tma_kernel one layer" in capsys.readouterr().err


WRONG = {
    "fp8": (["aot", "--target", "sm_80", "--precision", "fp8"], "sm_80 has no fp8"),
    "fp8 on sm_86": (["aot", "--target", "sm_86", "--precision", "fp8"], "sm_86 has no fp8"),
    "no kernels": (["aot", "--only", "nms", "convs"], "no kernels convs: there are bn_silu"),
    "aot variant": (["aot", "--variant", "yolov9"], "no variant 'yolov9'"),
    "aot batch": (["aot", "--batch", "0"], "batch is 0: give a whole number"),
    "tune variant": (["tune", "--variant", "yolov9"], "no variant 'yolov9'"),
    "tune batch": (["tune", "--batch", "1", "0"], "batch is 0: give a whole number"),
}


@pytest.mark.parametrize(("words", "message"), WRONG.values(), ids=WRONG)
def test_wrong_options_are_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(words) == 1
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_tune_without_a_gpu_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err


def test_tune_gives_each_batch_a_plan_and_prints_what_it_finds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[tuple[Any, ...]] = []

    def workload(*words: Any) -> dict[str, Any]:
        asked.append(words)
        return {"launches": [LAUNCH]}

    def tune_device(
        plans: Iterator[list[Launch]], device: torch.device, deadline: float
    ) -> Iterator[tuple[Launch, Entry]]:
        assert deadline - time.monotonic() == pytest.approx(120, abs=5)
        for plan in plans:
            (launch,) = plan
            yield launch, Entry(*launch.key, ConvConfig(block_m=1, block_n=1, block_k=1), 2.5, 9)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(signal, "signal", Mock())
    monkeypatch.setattr(tune, "workload", workload)
    monkeypatch.setattr(tune, "tune_device", tune_device)
    words = ["tune", "--batch", "1", "8", "--precision", "fp8", "--minutes", "2"]
    assert main(words) == 0
    assert asked == [("yolov7", 1, "fp8"), ("yolov7", 8, "fp8")]
    lines = capsys.readouterr().out.splitlines()
    assert [line.startswith(f"{LAUNCH.name}: 2.5 us, ") for line in lines] == [True, True, False]
    assert lines[-1].startswith("configs are in ")
