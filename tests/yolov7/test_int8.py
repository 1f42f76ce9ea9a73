"""int8 on a CPU: its convolutions, pools and scales, whole networks, and what is refused."""

import copy
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.yolov7.networks import SMALL, small_model
from yolov7 import Detector
from yolov7.checkpoint import DEMO_WEIGHTS, load_model
from yolov7.cli import main
from yolov7.engine import int8
from yolov7.engine.choose import Runtime, open_network
from yolov7.engine.eager import Network
from yolov7.engine.graph.calibrate import calibrate
from yolov7.engine.graph.trace import trace
from yolov7.engine.int8 import (
    Int8Conv,
    Int8Forward,
    Scale,
    largest_around,
    largest_of_4,
    leaky_bytes,
)
from yolov7.errors import UserError
from yolov7.kernels.conv.layer import Activation, activate
from yolov7.model import YOLOv7

CPU = torch.device("cpu")
ASSETS = Path(int8.__file__).parents[1] / "assets"
exact = pytest.mark.skipif(
    not int8.sums_are_exact(), reason="this processor has neither VNNI nor AMX"
)


def random_bytes(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


@exact
@pytest.mark.parametrize("activation", ["silu", "leaky_relu", "none"])
@pytest.mark.parametrize("target", [Scale(0.05, 40), None], ids=["bytes", "fp32"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (3, 2), (1, 1)])
def test_a_convolution_is_rounded_once(
    activation: Activation, target: Scale | None, kernel: int, stride: int
) -> None:
    """The border is zero, not the byte 0. LeakyReLU is rounded twice, and cut off below."""
    torch.manual_seed(0)
    conv = nn.Conv2d(24, 40, kernel, stride, kernel // 2).requires_grad_(False)
    source, x = Scale(0.02, 40), random_bytes(2, 24, 9, 7)
    layer = Int8Conv(conv, activation, source, target)
    rounded = (layer.weight * layer.scales[:, None, None, None]).float()
    y = layer(x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert (rounded - conv.weight).abs().max() <= conv.weight.abs().max() / 254 + 1e-6
    numbers = (x.float() - source.zero) * source.unit
    expected = F.conv2d(numbers, rounded, conv.bias, stride, kernel // 2)
    if target is not None and activation == "leaky_relu":
        expected = expected.clamp(min=-target.zero * target.unit)
    expected = activate(expected, activation)
    if target is None:
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
        return
    steps = (expected / target.unit + target.zero).round().clamp(0, 255) - y.float()
    assert steps.abs().max() <= 1
    assert (steps != 0).float().mean() < (0.2 if activation == "leaky_relu" else 0.01)


@pytest.mark.parametrize("zero", [0, 1, 77, 127, 128, 255])
@pytest.mark.parametrize("shape", [(1, 256, 1, 1), (1, 1, 16, 16), (2, 64, 2, 1)])
def test_leaky_relu_of_every_byte(zero: int, shape: tuple[int, ...]) -> None:
    """To the nearest byte, halves upwards, whatever code of OpenCV's a size takes."""
    x = (
        torch.arange(256, dtype=torch.uint8)
        .view(shape)
        .contiguous(memory_format=torch.channels_last)
    )
    steps = x.long() - zero
    tenths = torch.div(steps + 5, 10, rounding_mode="floor")  # of steps below zero
    expected = torch.where(steps < 0, tenths, steps) + zero
    found = leaky_bytes(x.clone(memory_format=torch.preserve_format), zero)
    assert torch.equal(found.long(), expected)
    assert found.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("size", [(13, 11), (5, 4), (2, 2)])
def test_pools_of_bytes(size: tuple[int, int]) -> None:
    x = random_bytes(2, 8, *size)
    for pooled, expected in (
        (largest_of_4(x), F.max_pool2d(x.float(), 2)),
        *(
            (largest_around(x, side), F.max_pool2d(x.float(), side, 1, side // 2))
            for side in (5, 9, 13)
        ),
    ):
        assert torch.equal(pooled.float(), expected)
        assert pooled.is_contiguous(memory_format=torch.channels_last)


def test_maps_that_are_joined_share_a_scale() -> None:
    model = small_model("yolov7")
    ops, outputs = trace(model, model.stride, model.stride)
    ranges = {op.output.name: 1.0 + i for i, op in enumerate(ops)}
    scales = int8.scales_of(ops, (), ranges)
    assert scales.keys() == {ops[0].inputs[0], *(op.output for op in ops)}
    for op in ops:
        if op.kind in int8.SHARING:
            assert {scales[value] for value in op.inputs} == {scales[op.output]}
    units = {scales[op.output].unit for op in ops if op.kind == "conv"}
    assert len(units) > 10
    for value in outputs:  # SiLU: from -0.28 to the range
        unit, zero = scales[value]
        assert unit * (255 - zero) == pytest.approx(ranges[value.name], abs=unit)
        assert unit * zero == pytest.approx(int8.SILU_LEAST, abs=unit)


def calibrated(model: YOLOv7, x: Tensor) -> YOLOv7:
    model.ranges = {"int8": calibrate(copy.deepcopy(model), [x], torch.int8)}
    return model


@exact
@torch.no_grad()
@pytest.mark.parametrize("name", SMALL)
def test_all_variants_stay_near(name: str) -> None:
    model = small_model(name)
    x = torch.rand(1, 3, 128, 128).contiguous(memory_format=torch.channels_last)
    expected = model.lead_outputs(x)
    outputs = Int8Forward(calibrated(model, x))(x)
    for actual, wanted in zip(outputs, expected, strict=True):
        from_image = wanted - wanted.mean((2, 3), keepdim=True)  # the rest is the bias
        assert 1e-3 < float((actual - wanted).norm() / from_image.norm()) < 0.1


@exact
@torch.no_grad()
def test_a_map_without_a_range_stays_in_fp32() -> None:
    model = small_model("yolov7-tiny")
    x = torch.rand(1, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    expected = model.lead_outputs(x)[0]
    ranges = calibrated(copy.deepcopy(model), x).ranges["int8"]
    errors = []
    for left in (list(ranges), list(ranges)[::2], list(ranges)[:1]):
        other = copy.deepcopy(model)
        other.ranges = {"int8": {name: ranges[name] for name in left}}
        errors.append(float((Int8Forward(other)(x)[0] - expected).norm()))
    assert errors[0] > errors[1] > errors[2] > 0  # the image at least is in bytes


@exact
def test_weights_are_kept_in_bytes_alone() -> None:
    x = torch.rand(1, 3, 64, 64)
    model = calibrated(small_model("yolov7-tiny"), x)
    weights = sum(conv.weight.numel() for conv in model.modules() if isinstance(conv, nn.Conv2d))
    network = Network(model, CPU, "int8")
    network(x)
    left = sum(p.numel() for p in model.parameters() if p.dim() == 4)
    assert left < weights / 10  # those of the heads, which stay in fp32


@exact
def test_first_calls_of_several_threads() -> None:
    model = small_model("yolov7-tiny")
    x = torch.rand(1, 3, 64, 64)
    calibrated(model, x)
    network, other = (Network(copy.deepcopy(model), CPU, "int8") for _ in range(2))
    alone = other(x)
    with ThreadPoolExecutor(4) as pool:
        for y in pool.map(lambda _: network(x), range(8)):
            assert torch.equal(y, alone)


@exact
def test_predict_finds_the_same_cells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = ASSETS / "images"
    weights = tmp_path / "int8.safetensors"
    source = ["--weights", str(ASSETS / DEMO_WEIGHTS), "--output", str(weights)]
    assert main(["convert", *source, "--precision", "int8", "--calibrate", str(images)]) == 0
    capsys.readouterr()
    image = str(min(images.glob("*.jpg")))
    (plain,) = Detector(device="cpu")(image)
    (found,) = Detector(weights, device="cpu", precision="int8")(image)
    assert 0.9 * len(plain.boxes) <= len(found.boxes) <= 1.1 * len(plain.boxes)
    distances = torch.cdist(found.boxes.xyxy, plain.boxes.xyxy).amin(1)
    assert distances.median() < 2  # pixels
    table = tmp_path / "table.json"
    assert main(["info", str(weights), "--precision", "int8", "--json", str(table)]) == 0
    told = json.loads(table.read_text())
    rows, totals = told["rows"], told["totals"]
    assert totals["int8"] == sum(row["reads"] == "int8" for row in rows) >= len(rows) - 2
    assert 0.9 < totals["int8_flops"] / totals["flops"] <= 1
    assert [row["writes"] for row in rows[-3:]] == ["fp32"] * 3  # what the head reads
    kept = [row for row in rows if row["step"] and row["largest"]]
    assert all(row["largest"] <= 255 * row["step"] for row in kept)
    assert f"{totals['int8']} of {len(rows)} convolutions read int8" in capsys.readouterr().out
    assert main(["info", str(ASSETS / DEMO_WEIGHTS), "--precision", "int8"]) == 1
    assert "no int8 ranges in these weights: yolov7 convert" in capsys.readouterr().err
    assert main(["info", str(weights), "--precision", "int8", "--plan"]) == 1
    assert "two tables: ask for one" in capsys.readouterr().err


def test_what_int8_needs_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    model = load_model()
    monkeypatch.setattr(int8, "sums_are_exact", lambda: True)

    def said(engine: str = "auto") -> str:
        with pytest.raises(UserError) as error:
            open_network(Runtime(weights=model, precision="int8", device="cpu", engine=engine))
        return str(error.value)

    assert "yolov7 convert --precision int8 --calibrate FOLDER" in said()
    assert "needs engine graph, or eager on a CPU, not compile on cpu" in said(engine="compile")
    model.ranges = {"int8": {"another.map": 1.0}}
    assert "those of another network" in said()
    monkeypatch.setattr(int8, "sums_are_exact", lambda: False)
    assert "neither VNNI nor AMX" in said()


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="x86's instructions")
def test_a_processor_that_saturates_is_found_out() -> None:
    code = "from yolov7.engine.int8 import sums_are_exact; print(sums_are_exact())"
    settings = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX2"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
