"""The tuner's parts that need no GPU, and one layer tuned in the interpreter."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from yolov7.kernels import aot, runtime, tune
from yolov7.kernels.conv import ConvCall, cases, conv_reference, launch_conv
from yolov7.kernels.conv.cases import Calls, Record, layer_of, meta_call, stem_call
from yolov7.kernels.conv.launcher import default_config
from yolov7.kernels.conv.search import ordered_configs, search_space
from yolov7.kernels.runtime import find_config, recording
from yolov7.kernels.tune import Entry

CHAIN = Record(128, 128, 3, 1, 80, 80)
HEAD = Record(256, 255, 1, 1, 80, 80, "none")
SMALL = Record(16, 24, 1, 1, 4, 5)
STEM = Record(3, 32, 3, 1, 6, 7)
CPU = torch.device("cpu")


def launch_of(*records: Record, batch: int = 1, dtype: torch.dtype = torch.float16) -> Calls:
    if records[0].in_channels == 3:
        return stem_call(records[0], batch, dtype)
    return [meta_call(layer_of(record, batch), dtype) for record in records]


def test_plans_take_turns_with_their_expensive_launches_first_and_only_once() -> None:
    """A tuner that runs out of time knows something about every batch size."""
    few = Record(64, 64, 3, 1, 80, 80)
    records = {1: (HEAD, CHAIN, CHAIN, few), 32: (HEAD, CHAIN, CHAIN)}
    plans = [[launch_of(r, batch=batch) for r in found] for batch, found in records.items()]
    found = tune.launches_to_tune(*plans)
    sizes = [(x.layer.target.n, x.weight.shape[1]) for (x,) in map(tune.members, found)]
    assert sizes == [(1, 9 * 128), (32, 9 * 128), (1, 256), (32, 256), (1, 9 * 64)]
    for batch in records:
        own = [launch for launch in found if tune.members(launch)[0].layer.target.n == batch]
        seconds = list(map(tune.expected_seconds, own))
        assert seconds == sorted(seconds, reverse=True)
    assert tune.launches_to_tune(plans[0], plans[0]) == tune.launches_to_tune(plans[0])


def test_roofline_counts_operations_or_bytes() -> None:
    layer = layer_of(CHAIN, 32)
    two = launch_of(CHAIN, CHAIN, batch=32)
    assert tune.expected_seconds(two) == 2 * layer.flops / tune.RATE
    (call,) = tune.members(launch_of(HEAD, batch=32))
    assert isinstance(call, ConvCall)
    sizes = 2 * (call.x.numel() + call.out.numel() + call.weight.numel()) + 4 * 255
    assert tune.expected_seconds([call]) == pytest.approx(sizes / tune.BANDWIDTH)


@pytest.mark.parametrize("variant", ["yolov7", "yolov7-e6e"])
@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_every_launch_of_a_plan_is_tuned(variant: str, precision: str) -> None:
    launches = aot.workload(variant, 1, precision)["calls"]
    kinds = {tune.launch_key(launch)[0] for launch in tune.launches_to_tune(launches)}
    expected = {"3x3s1", "1x1s1", "1x1s1-upsample", "3x3s2+1x1s1-pool", "1x1s1+1x1s1"}
    expected |= {"stem3x3s1"} if variant == "yolov7" else {"stem6x6s2", "1x1s1-sum"}
    assert {f"{kind}-{precision}" for kind in expected} <= kinds
    with recording((9, 0)):
        for launch in launches:
            assert len(ordered_configs(launch, (9, 0))) >= 6


@pytest.mark.aot
def test_fp8_layers_with_a_wider_output_have_configs_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The output waits in shared memory: what fits as fp8 does not as fp16."""
    narrow = meta_call(layer_of(Record(256, 256, 1, 1, 80, 80), 32), torch.float8_e4m3fn)
    wide = replace(narrow, out=narrow.out.to(torch.float16))
    kinds = {
        tune.launch_key(calls)[0]
        for calls in ([narrow], [wide], [narrow, narrow], [narrow, wide], [wide, narrow])
    }
    assert kinds == {
        "1x1s1-fp8",
        "1x1s1-to-fp16-fp8",
        "1x1s1+1x1s1-fp8",
        "1x1s1+1x1s1-to-fp16-fp8",
        "1x1s1-to-fp16+1x1s1-fp8",
    }
    assert cases.call_name([wide]) == cases.call_name([narrow])

    config = {"TMA": 1, "BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 128, "SPLIT_K": 1}
    config |= {"num_warps": 8, "num_stages": 4, "FLATTEN": 1, "OCCUPANCY": 1, "launch_pdl": 1}
    entry = Entry(*tune.launch_key([narrow]), config, 1.0, 9)
    tune.write_entries(tmp_path / "fp8_GPU" / "conv.json", [entry], (9, 0), "fp8_GPU")
    monkeypatch.setattr(runtime, "CONFIGS", tmp_path)
    for call in (narrow, wide):
        with recording((9, 0), "fp8_GPU") as specs:
            chosen = cases.chosen_config([call])
            cases.bound([call], chosen)()
        assert (chosen == config) == (call is narrow)
        assert aot.passed_limits(aot.compile_spec(specs[0], "sm_90")) == []


@pytest.mark.parametrize("capability", [(8, 0), (9, 0)], ids=["sm_80", "sm_90"])
@pytest.mark.parametrize("record", [CHAIN, HEAD, Record(512, 512, 3, 2, 40, 40), SMALL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_search_space_is_small_and_fits(
    record: Record, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    calls = [meta_call(layer_of(record, 1), dtype)]
    configs = list(search_space(calls, capability))
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
        calls = [meta_call(layer_of(CHAIN, 32), torch.float16)]
        configs, default = ordered_configs(calls, (9, 0)), default_config(calls)
    assert configs[0] == default
    assert configs.count(configs[0]) == 1


def test_error_of_nan_is_infinite() -> None:
    ones = torch.ones(4)
    assert tune.relative_error(ones, ones) == 0
    assert tune.relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert tune.relative_error(torch.full((4,), float("nan")), ones) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_random_launches_have_outputs_of_order_one(dtype: torch.dtype) -> None:
    layer = layer_of(Record(64, 32, 3, 1, 6, 7), 2)
    described = meta_call(layer, dtype, residual=True)
    call = tune.random_call(replace(described, x=described.x[:, :64]), CPU)
    assert (call.x[layer.source.border()].float() == 0).all()
    assert call.out.stride() == described.out.stride()
    (stem,) = tune.members(tune.random_calls(launch_of(STEM), CPU))
    for expected in (*tune.references([call]), *tune.references(stem)):  # type: ignore[arg-type]
        assert 0.2 <= float(expected.std()) <= 3


@pytest.mark.interpreter
def test_wrong_config_is_rejected_and_the_fastest_right_one_wins(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """A fault is planted where a miscompiled kernel would be: in what the launch computes."""

    def faulty(calls: list[ConvCall], config: runtime.Config, workspace: torch.Tensor) -> None:
        launch_conv(calls, config, workspace)
        if config["num_warps"] == 8:
            calls[-1].out[3, 3] += 1

    monkeypatch.setattr(cases, "launch_conv", faulty)
    calls = tune.random_calls(launch_of(SMALL, SMALL), kernel_device)
    shared = {"TMA": 0, "BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16, "SPLIT_K": 1, "num_stages": 2}
    configs = [{**shared, "num_warps": warps} for warps in (1, 2, 8, 4)]
    configs.append({**shared, "BLOCK_M": 17, "num_warps": 4})  # does not compile
    times = iter([3e-6, 1e-6, 2e-6])  # one for each right config
    said: list[str] = []
    best = tune.tune_launch(calls, configs, lambda _: next(times), report=said.append)
    assert best is not None
    assert (best.config["num_warps"], best.microseconds, best.tried) == (2, 1.0, 5)
    assert len(said) == 2
    assert "relative error" in said[0]


@pytest.mark.parametrize(("exact", "fits"), [(False, True), (True, False)], ids=["tf32", "exact"])
def test_exact_layers_are_held_to_more_than_tf32(
    exact: bool, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_tf32(calls: list[ConvCall], *_: object) -> None:
        for call in calls:
            call.out.copy_(conv_reference(call) * (1 + 2**-11))

    monkeypatch.setattr(cases, "launch_conv", as_tf32)
    layer = layer_of(SMALL, 1, exact=exact)
    calls = tune.random_calls([meta_call(layer, torch.float32)], CPU)
    fault = tune.check_config(calls, tune.references(calls), {"SPLIT_K": 1})
    assert (fault is None) == fits


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError], ids=["own", "triton"])
def test_lost_device_ends_the_tuner(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs any more in its context; Triton's own errors are not told from others."""

    def fails(*_: object) -> None:
        raise error("an illegal memory access was encountered")

    def synchronize() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(cases, "launch_conv", fails)
    calls = tune.random_calls(launch_of(SMALL), CPU)
    expected = tune.references(calls)
    if error is RuntimeError:
        assert "illegal memory" in str(tune.check_config(calls, expected, {"SPLIT_K": 1}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(torch.AcceleratorError):
        tune.check_config(calls, expected, {"SPLIT_K": 1})


def test_config_that_took_a_process_down_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "Some_GPU" / "trials.json"
    tried: list[int] = []

    def check(_: Calls, __: object, config: runtime.Config) -> None:
        *_, noted = json.loads(path.read_text())["fatal"]
        assert noted == [*launch, dict(config)]
        tried.append(config["num_warps"])
        if config["num_warps"] == 8:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(tune, "check_config", check)
    calls = tune.random_calls(launch_of(SMALL), CPU)
    kind, size = tune.launch_key(calls)
    launch = [kind, list(size)]
    configs = [{"SPLIT_K": 1, "num_warps": warps} for warps in (2, 4, 8, 1)]

    def run() -> Entry | None:
        trials = tune.Trials(path)
        left = trials.left(calls, configs)
        return tune.tune_launch(calls, left, lambda _: 1e-6, attempt=partial(trials.note, calls))

    with pytest.raises(torch.AcceleratorError):
        run()
    best = run()
    assert best is not None
    assert (best.tried, tried) == (3, [2, 4, 8, 2, 4, 1])
    assert json.loads(path.read_text()) == {"fatal": [[*launch, configs[2]]]}
    # Of another launch nothing is known.
    other = tune.random_calls(launch_of(SMALL, SMALL), CPU)
    assert tune.Trials(path).left(other, configs) == configs


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_tuner_that_is_stopped_blames_no_config(
    tmp_path: Path, stop: type[BaseException]
) -> None:
    path = tmp_path / "Some_GPU" / "trials.json"
    with pytest.raises(stop), tune.Trials(path).note(launch_of(SMALL), {"num_warps": 4}):
        raise stop
    assert not path.exists()


def test_trials_that_end_well_leave_no_file(tmp_path: Path) -> None:
    trials = tune.Trials(tmp_path / "Some_GPU" / "trials.json")
    calls = launch_of(SMALL)
    with trials.note(calls, {"num_warps": 4}):
        assert list(tmp_path.rglob("*.json"))
    assert not list(tmp_path.rglob("*.json"))


def test_timer_replays_a_captured_launch_between_events(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host takes longer to launch a small layer than the device to run it."""
    said: list[str] = []

    @contextmanager
    def graph(_: object) -> Iterator[None]:
        said.append("capture")
        yield
        said.append("end")

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("event")

        def elapsed_time(self, _: object) -> float:
            return 2.0

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: Mock(replay=lambda: said.append("replay")))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    flush = Mock(zero_=lambda: said.append("flush"))
    assert tune.time_config(lambda: said.append("run"), flush, repeats=2) == 2e-3
    assert said == ["capture", "run", "end", *5 * ["flush", "event", "replay", "event"]]


def test_time_box_tries_nothing_more() -> None:
    calls = tune.random_calls(launch_of(SMALL), CPU)
    assert tune.tune_launch(calls, [{"TMA": 0}], lambda _: 1.0, deadline=0.0) is None


@pytest.mark.interpreter
def test_stem_is_tuned(kernel_device: torch.device) -> None:
    calls = tune.random_calls(launch_of(STEM), kernel_device)
    configs = ordered_configs(calls, (8, 0))[:3]
    best = tune.tune_launch(calls, configs, lambda _: 1e-6)
    assert best is not None
    assert (best.kind, best.size, best.tried) == ("stem3x3s1-fp16", (7 * 8, 32), 3)


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
        assert find_config("3x3s1-fp16", (1200, 64, 576), {}, device) == config


def test_without_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert tune.main([]) == 1
    assert "needs a CUDA device" in capsys.readouterr().err
