"""The tuner's parts that need no GPU, and one layer tuned in the interpreter."""

import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from yolov7.engine.graph.workload import workload
from yolov7.kernels import aot, tune
from yolov7.kernels.aot import compiled_kernel
from yolov7.kernels.conv import ConvCall, ConvConfig, ConvLaunch, Launch, StemLaunch, Workspace
from yolov7.kernels.conv.cases import Record, layer_of, meta_call, stem_call
from yolov7.kernels.conv.config import Entry, tuned_entries, write_entries
from yolov7.kernels.runtime import H200, CompileSpec, recording

CHAIN = Record(128, 128, 3, 1, 80, 80)
HEAD = Record(256, 255, 1, 1, 80, 80, "none")
SMALL = Record(16, 24, 1, 1, 4, 5)
STEM = Record(3, 32, 3, 1, 6, 7)
CPU = torch.device("cpu")
CONFIG = ConvConfig(block_m=16, block_n=32, block_k=16)


def launch_of(*records: Record, batch: int = 1, dtype: torch.dtype = torch.float16) -> Launch:
    if records[0].in_channels == 3:
        return StemLaunch(stem_call(records[0], batch, dtype))
    return ConvLaunch([meta_call(layer_of(record, batch), dtype) for record in records])


def test_plans_take_turns_with_their_expensive_launches_first_and_only_once() -> None:
    """A tuner that runs out of time knows something about every batch size."""
    few = Record(64, 64, 3, 1, 80, 80)
    records = {1: (HEAD, CHAIN, CHAIN, few), 32: (HEAD, CHAIN, CHAIN)}
    plans = [[launch_of(r, batch=batch) for r in found] for batch, found in records.items()]
    found = tune.launches_to_tune(*plans)
    sizes = [(x.layer.target.n, x.weight.shape[1]) for (x,) in (launch.calls for launch in found)]
    assert sizes == [(1, 9 * 128), (32, 9 * 128), (1, 256), (32, 256), (1, 9 * 64)]
    for batch in records:
        own = [launch for launch in found if launch.calls[0].layer.target.n == batch]
        seconds = list(map(tune.expected_seconds, own))
        assert seconds == sorted(seconds, reverse=True)
    assert tune.launches_to_tune(plans[0], plans[0]) == tune.launches_to_tune(plans[0])


def test_roofline_counts_operations_or_bytes() -> None:
    layer = layer_of(CHAIN, 32)
    two = launch_of(CHAIN, CHAIN, batch=32)
    assert tune.expected_seconds(two) == 2 * layer.flops / H200.flops
    launch = launch_of(HEAD, batch=32)
    (call,) = launch.calls
    assert isinstance(call, ConvCall)
    sizes = 2 * (call.x.numel() + call.out.numel() + call.weight.numel()) + 4 * 255
    assert tune.expected_seconds(launch) == pytest.approx(sizes / H200.bandwidth)


@pytest.mark.parametrize("variant", ["yolov7", "yolov7-e6e"])
@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_every_launch_of_a_plan_is_tuned(variant: str, precision: str) -> None:
    launches = workload(variant, 1, precision)["launches"]
    kinds = {launch.key[0] for launch in tune.launches_to_tune(launches)}
    expected = {"3x3s1", "1x1s1", "1x1s1-upsample", "3x3s2+1x1s1-pool", "1x1s1+1x1s1"}
    expected |= {"stem3x3s1"} if variant == "yolov7" else {"stem6x6s2", "1x1s1-sum"}
    assert {f"{kind}-{precision}" for kind in expected} <= kinds
    with recording((9, 0)):
        for launch in launches:
            assert len(launch.configs()) >= 6


@pytest.mark.aot
def test_fp8_layers_with_a_wider_output_have_configs_of_their_own(
    own_configs: Path,
) -> None:
    """The output waits in shared memory: what fits as fp8 does not as fp16."""
    narrow = meta_call(layer_of(Record(256, 256, 1, 1, 80, 80), 32), torch.float8_e4m3fn)
    wide = replace(narrow, out=narrow.out.to(torch.float16))
    kinds = {
        ConvLaunch(calls).key[0]
        for calls in ([narrow], [wide], [narrow, narrow], [narrow, wide], [wide, narrow])
    }
    assert kinds == {
        "1x1s1-fp8",
        "1x1s1-to-fp16-fp8",
        "1x1s1+1x1s1-fp8",
        "1x1s1+1x1s1-to-fp16-fp8",
        "1x1s1-to-fp16+1x1s1-fp8",
    }
    assert ConvLaunch([wide]).name == ConvLaunch([narrow]).name

    config = ConvConfig(
        tma=True,
        block_m=128,
        block_n=256,
        block_k=128,
        num_warps=8,
        num_stages=4,
        flatten=True,
        launch_pdl=True,
    )
    entry = Entry(*ConvLaunch([narrow]).key, config, 1.0, 9)
    write_entries(own_configs / "fp8_GPU" / "conv.json", {entry.key: entry}, (9, 0), "fp8_GPU")
    for call in (narrow, wide):
        with recording((9, 0), "fp8_GPU") as specs:
            launch = ConvLaunch([call])
            launch.prepare()()
            assert (launch.chosen() == config) == (call is narrow)
        assert aot.passed_limits(aot.compile_spec(specs[0], "sm_90")) == []


def test_error_of_nan_is_infinite() -> None:
    ones = torch.ones(4)
    assert tune.relative_error(ones, ones) == 0
    assert tune.relative_error(ones * 1.5, ones) == pytest.approx(0.5)
    assert tune.relative_error(torch.full((4,), float("nan")), ones) == float("inf")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_random_launches_have_outputs_of_order_one(dtype: torch.dtype) -> None:
    layer = layer_of(Record(64, 32, 3, 1, 6, 7), 2)
    described = meta_call(layer, dtype, residual=True)
    call = replace(described, x=described.x[:, :64]).random(CPU)
    assert (call.x[layer.source.border()].float() == 0).all()
    assert call.out.stride() == described.out.stride()
    stem = launch_of(STEM).random(CPU)
    for expected in (call.reference(), *stem.reference()):
        assert 0.2 <= float(expected.std()) <= 3


@pytest.mark.interpreter
def test_wrong_config_is_rejected_and_the_fastest_right_one_wins(
    monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    """A fault is planted where a miscompiled kernel would be: in what the launch computes."""
    prepare = ConvLaunch.prepare

    def faulty(launch: ConvLaunch, config: ConvConfig) -> Callable[[], None]:
        run = prepare(launch, config, Workspace())

        def wrong() -> None:
            run()
            if config.num_warps == 8:
                launch.calls[-1].out[3, 3] += 1

        return wrong

    monkeypatch.setattr(ConvLaunch, "prepare", faulty)
    launch = launch_of(SMALL, SMALL).random(kernel_device)
    configs = [replace(CONFIG, num_warps=warps) for warps in (1, 2, 8, 4)]
    configs.append(replace(CONFIG, block_m=17))  # does not compile
    times = iter([3e-6, 1e-6, 2e-6])  # one for each right config
    said: list[str] = []
    best = tune.tune_launch(launch, configs, lambda _: next(times), report=said.append)
    assert best is not None
    assert (best.config.num_warps, best.microseconds, best.tried) == (2, 1.0, 5)
    assert len(said) == 2
    assert "relative error" in said[0]


def test_config_whose_results_differ_from_run_to_run_is_rejected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A race that is lost in one run of ten: the check of one run does not see it."""
    runs = 0

    def prepare(launch: ConvLaunch, config: ConvConfig) -> Callable[[], None]:
        def run() -> None:
            nonlocal runs
            runs += 1
            for call in launch.calls:
                call.out.copy_(call.reference())
                if config.num_warps == 8 and runs % 10 == 0:
                    call.out[3, 3] *= 1.001

        return run

    monkeypatch.setattr(ConvLaunch, "prepare", prepare)
    launch = launch_of(SMALL).random(CPU)
    said: list[str] = []
    configs = [replace(CONFIG, num_warps=warps) for warps in (8, 4)]
    times = iter([1e-6, 2e-6])
    best = tune.tune_launch(launch, configs, lambda _: next(times), report=said.append)
    assert best is not None
    assert best.config.num_warps == 4
    assert runs == 2 + 10 - 2 + 20
    assert [line for line in said if "differ from run to run" in line] == said != []


@pytest.mark.aot
def test_configs_are_compiled_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that does not compile hinders no other, nor does one that fails once.

    The launcher finds the machine code.
    """
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    configs = [replace(CONFIG, num_warps=warps) for warps in (1, 2, 4)]
    configs += [configs[0], replace(CONFIG, block_m=17)]
    asked: Counter[str] = Counter()

    def noted(spec: CompileSpec, capability: tuple[int, int]) -> object:
        config = str(spec.config)
        asked[config] += 1
        if asked[config] == 1 and spec.config["num_warps"] == 2:
            raise RuntimeError("beside others")
        return compiled_kernel(spec, capability)

    monkeypatch.setattr(tune, "compiled_kernel", noted)
    assert tune.compile_configs(launch_of(SMALL), configs, (9, 0), threads=2) == 3, asked
    assert len(list(tmp_path.rglob("conv_gather_kernel.cubin"))) == 3
    again = [config for config, times in asked.items() if times == 2]
    assert len(asked) == 4
    assert any("'num_warps': 2" in config for config in again)  # it fails beside others
    assert any("'BLOCK_M': 17" in config for config in again)  # it never compiles


@pytest.mark.parametrize(("exact", "fits"), [(False, True), (True, False)], ids=["tf32", "exact"])
def test_exact_layers_are_held_to_more_than_tf32(
    exact: bool, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def as_tf32(launch: ConvLaunch, _: ConvConfig) -> Callable[[], None]:
        (call,) = launch.calls

        def run() -> None:
            call.out.copy_(call.reference() * (1 + 2**-11))

        return run

    monkeypatch.setattr(ConvLaunch, "prepare", as_tf32)
    launch = ConvLaunch([meta_call(layer_of(SMALL, 1, exact=exact), torch.float32)]).random(CPU)
    fault = tune.check_config(launch, launch.reference(), CONFIG)
    assert (fault is None) == fits


@pytest.mark.parametrize("error", [torch.AcceleratorError, RuntimeError], ids=["own", "triton"])
def test_lost_device_ends_the_tuner(
    error: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing runs any more in its context; Triton's own errors are not told from others."""

    def fails(*_: object) -> Callable[[], None]:
        raise error("an illegal memory access was encountered")

    def synchronize() -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(ConvLaunch, "prepare", fails)
    launch = launch_of(SMALL).random(CPU)
    expected = launch.reference()
    if error is RuntimeError:
        assert "illegal memory" in str(tune.check_config(launch, expected, CONFIG))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", synchronize)
    with pytest.raises(torch.AcceleratorError):
        tune.check_config(launch, expected, CONFIG)


def test_config_that_took_a_process_down_is_not_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "Some_GPU" / "trials.json"
    tried: list[int] = []

    def check(_: Launch, __: object, config: ConvConfig) -> str | None:
        *_, noted = json.loads(path.read_text())["fatal"]
        assert noted == [*key, asdict(config)]
        tried.append(config.num_warps)
        if config.num_warps == 8:
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        return None

    monkeypatch.setattr(tune, "check_config", check)
    launch = launch_of(SMALL).random(CPU)
    kind, size = launch.key
    key = [kind, list(size)]
    configs = [replace(CONFIG, num_warps=warps) for warps in (2, 4, 8, 1)]

    def run() -> Entry | None:
        trials = tune.Trials(path)
        left = trials.left(launch, configs)
        return tune.tune_launch(launch, left, lambda _: 1e-6, attempt=partial(trials.note, launch))

    with pytest.raises(torch.AcceleratorError):
        run()
    best = run()
    assert best is not None
    assert (best.tried, tried) == (3, [2, 4, 8, 2, 4, 1])
    assert json.loads(path.read_text()) == {"fatal": [[*key, asdict(configs[2])]]}
    # Of another launch nothing is known.
    other = launch_of(SMALL, SMALL).random(CPU)
    assert tune.Trials(path).left(other, configs) == configs


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_a_tuner_that_is_stopped_blames_no_config(
    tmp_path: Path, stop: type[BaseException]
) -> None:
    path = tmp_path / "Some_GPU" / "trials.json"
    with pytest.raises(stop), tune.Trials(path).note(launch_of(SMALL), CONFIG):
        raise stop
    assert not path.exists()


def test_trials_that_end_well_leave_no_file(tmp_path: Path) -> None:
    trials = tune.Trials(tmp_path / "Some_GPU" / "trials.json")
    with trials.note(launch_of(SMALL), CONFIG):
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
    runs = 4 * [lambda: said.append("run")]
    flush = Mock(zero_=lambda: said.append("flush"))
    assert tune.time_chain(runs, flush, repeats=2) == 2e-3 / 4
    assert said == ["capture", *4 * ["run"], "end", *5 * ["flush", "event", "replay", "event"]]


def test_a_chain_shares_maps_and_no_weights() -> None:
    launch = launch_of(SMALL).random(CPU)
    (expected,) = launch.reference()
    call = launch.calls[0]
    for run in tune.chain(launch, CONFIG):
        call.out.zero_()
        run()
        torch.testing.assert_close(call.out.float(), expected, rtol=1e-2, atol=1e-2)
        call.weight.zero_()  # the others have their own
    assert len(tune.chain(launch_of(STEM).random(CPU), CONFIG)) == 1


def test_time_box_tries_nothing_more() -> None:
    launch = launch_of(SMALL).random(CPU)
    assert tune.tune_launch(launch, [CONFIG], lambda _: 1.0, deadline=0.0) is None


@pytest.mark.interpreter
def test_stem_is_tuned(kernel_device: torch.device) -> None:
    launch = launch_of(STEM).random(kernel_device)
    best = tune.tune_launch(launch, launch.configs()[:3], lambda _: 1e-6)
    assert best is not None
    assert (best.kind, best.size, best.tried) == ("stem3x3s1-fp16", (7 * 8, 32), 3)


def test_shipped_configs_are_each_there_once(own_configs: Path) -> None:
    """What was tuned for the kind, where it suits the tensors."""
    launch = launch_of(CHAIN, batch=2)
    kind, (rows, *rest) = launch.key
    tuned = [replace(CONFIG, block_m=m) for m in (16, 64, 64)] + [replace(CONFIG, tma=True)]
    sizes = [(rows, *rest), (9 * rows, *rest), (90 * rows, *rest), (99 * rows, *rest)]
    entries = [Entry(kind, s, c, 1.0, 9) for s, c in zip(sizes, tuned, strict=True)]
    entries.append(Entry("1x1s1-fp16", sizes[0], replace(CONFIG, block_m=256), 1.0, 9))
    path = own_configs / "Some_GPU" / "conv.json"
    write_entries(path, {entry.key: entry for entry in entries}, (8, 0), "Some_GPU")
    assert set(tuned_entries("Some_GPU")) == {entry.key for entry in entries}
    with recording((8, 0), "Some_GPU"):
        found = tune.shipped_configs(launch)
        default = launch.configs()[0]
    assert list(found) == [
        "chosen",
        "default",
        f"of {9 * rows}x128x1152",
        f"of {99 * rows}x128x1152",
    ]
    assert list(found.values()) == [tuned[0], default, tuned[1], tuned[3]]
