"""The tuner's parts that need no GPU, and one layer tuned in the interpreter."""

import json
from pathlib import Path

import pytest
import torch

from yolov7.kernels import runtime, tune
from yolov7.kernels.conv import ConvCall, conv_reference, launch_conv
from yolov7.kernels.conv.cases import Record, layer_of, meta_call
from yolov7.kernels.conv.launcher import default_config
from yolov7.kernels.runtime import find_config, recording
from yolov7.kernels.tune import Entry

CHAIN = Record(128, 128, 3, 1, 80, 80)
HEAD = Record(256, 255, 1, 1, 80, 80, "none")
SMALL = Record(16, 24, 1, 1, 4, 5)


def test_expensive_layers_come_first_and_only_once() -> None:
    stem = Record(3, 32, 3, 1, 640, 640)
    layers = tune.layers_to_tune([HEAD, stem, CHAIN, CHAIN], [1, 32], torch.float16)
    assert [(x.source.n, x.kernel) for x in layers] == [(32, 3), (32, 1), (1, 3), (1, 1)]
    seconds = [tune.expected_seconds(layer, torch.float16) for layer in layers]
    assert seconds == sorted(seconds, reverse=True)


def test_roofline_counts_operations_or_bytes() -> None:
    layer = layer_of(CHAIN, 32)
    assert tune.expected_seconds(layer, torch.float16) == layer.flops / tune.RATE
    bound = layer_of(HEAD, 32)
    sizes = (bound.source.rows * 256, bound.target.rows * 255, 256 * 255)
    expected = 2 * sum(sizes) / tune.BANDWIDTH
    assert tune.expected_seconds(bound, torch.float16) == pytest.approx(expected)


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("record", [CHAIN, HEAD, Record(512, 512, 3, 2, 40, 40), SMALL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_search_space_is_small_and_fits(
    record: Record, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    call = meta_call(layer_of(record, 1), dtype)
    configs = list(tune.search_space(call, capability))
    assert 6 <= len(configs) <= 160
    assert len({str(config) for config in configs}) == len(configs)
    tma = capability == (9, 0) and record.stride == 1
    assert {config["TMA"] for config in configs} == {int(tma)}
    for config in configs:
        stage = (config["BLOCK_M"] + config["BLOCK_N"]) * config["BLOCK_K"] * dtype.itemsize
        assert config["num_stages"] * stage <= (227 if capability == (9, 0) else 99) * 1024
        assert config["BLOCK_K"] >= (32 if dtype.itemsize == 1 else 16)


def test_default_config_is_tried_first() -> None:
    with recording((9, 0)):
        configs = tune.ordered_configs(meta_call(layer_of(CHAIN, 32), torch.float16), (9, 0))
        default = default_config([meta_call(layer_of(CHAIN, 32), torch.float16)])
    assert configs[0] == default
    assert configs.count(configs[0]) == 1


def test_error_of_nan_is_infinite() -> None:
    ones = torch.ones(4)
    assert tune.relative_error(ones, ones) == 0
    assert tune.relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert tune.relative_error(torch.full((4,), float("nan")), ones) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_random_layers_have_outputs_of_order_one(dtype: torch.dtype) -> None:
    layer = layer_of(Record(64, 32, 3, 1, 6, 7), 2)
    call = tune.random_call(layer, dtype, torch.device("cpu"))
    assert (call.x[layer.source.border()].float() == 0).all()
    expected = conv_reference(call)
    assert 0.2 <= float(expected.std()) <= 3


@pytest.mark.interpreter
def test_wrong_config_is_rejected_and_the_fastest_right_one_wins(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """A fault is planted where a miscompiled kernel would be: in what the launch computes."""

    def faulty(calls: list[ConvCall], config: runtime.Config, workspace: torch.Tensor) -> None:
        launch_conv(calls, config, workspace)
        if config["num_warps"] == 8:
            calls[0].out[3, 3] += 1

    monkeypatch.setattr(tune, "launch_conv", faulty)
    call = tune.random_call(layer_of(SMALL, 1), torch.float16, kernel_device)
    shared = {"TMA": 0, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "SPLIT_K": 1, "num_stages": 2}
    configs = [{**shared, "num_warps": warps} for warps in (1, 2, 8, 4)]
    configs.append({**shared, "BLOCK_M": 17, "num_warps": 4})  # does not compile
    times = iter([3e-6, 1e-6, 2e-6])  # one for each right config
    said: list[str] = []
    best = tune.tune_layer(call, configs, lambda _: next(times), report=said.append)
    assert best is not None
    assert (best.config["num_warps"], best.microseconds, best.tried) == (2, 1.0, 5)
    assert len(said) == 2
    assert "relative error" in said[0]


def test_time_box_tries_nothing_more() -> None:
    call = tune.random_call(layer_of(SMALL, 1), torch.float32, torch.device("cpu"))
    assert tune.tune_layer(call, [{"TMA": 0}], lambda _: 1.0, deadline=0.0) is None


def test_written_configs_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "Some_GPU" / "conv.json"
    config = {"TMA": 1, "BLOCK_M": 64, "SPLIT_K": 1}
    entries = [
        Entry("3x3s1-fp16", (1000, 64, 576), config, 3.5, 40),
        Entry("3x3s1-fp16", (9000, 64, 576), {**config, "BLOCK_M": 256}, 9.5, 40),
    ]
    write = tune.write_entries
    write(path, entries[1:], (9, 0), "Some_GPU")
    write(path, entries, (9, 0), "Some_GPU")
    assert tune.load_entries(path) == {entry.key: entry for entry in entries}
    assert tune.load_entries(tmp_path / "none.json") == {}
    assert json.loads(path.read_text())["capability"] == [9, 0]
    assert [p.name for p in path.parent.iterdir()] == ["conv.json"]
    monkeypatch.setattr(runtime, "CONFIGS", tmp_path)
    device = torch.device("cuda")
    with recording((9, 0), "Some_GPU"):
        assert find_config("conv", "3x3s1-fp16", (1200, 64, 576), {}, device) == config


def test_without_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert tune.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
