"""What the compiler makes of the kernels, for GPUs that are not there."""

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from yolov7.kernels import aot
from yolov7.kernels.aot import Row, compile_all, compile_spec, load_table, passed_limits, worse
from yolov7.kernels.conv import ConvCall, launch_conv, workspace_elements
from yolov7.kernels.conv.cases import (
    DTYPES,
    SAMPLES,
    Record,
    bound,
    call_name,
    chosen_config,
    layer_of,
    meta_call,
    stem_call,
)
from yolov7.kernels.conv.launcher import default_config
from yolov7.kernels.runtime import recording

BASELINES = Path(__file__).parents[2] / "bench" / "baselines"
MATRIX = {
    "sm_80": {"fp16": "HMMA", "bf16": "HMMA", "fp32": "HMMA"},
    "sm_89": {"fp16": "HMMA", "bf16": "HMMA", "fp32": "HMMA", "fp8": "QMMA"},
    "sm_90": {"fp16": "HGMMA", "bf16": "HGMMA", "fp32": "HGMMA", "fp8": "QGMMA"},
    "sm_100": {"fp16": "UTCHMMA", "bf16": "UTCHMMA", "fp32": "UTCHMMA", "fp8": "UTCQMMA"},
}
CHAIN = Record(128, 128, 3, 1, 80, 80)
STEMS = {  # of the whole family
    "tiny": Record(3, 32, 3, 2, 640, 640, "leaky_relu"),
    "v7": Record(3, 32, 3, 1, 640, 640),
    "x": Record(3, 40, 3, 1, 640, 640),
    "w6": Record(12, 64, 3, 1, 640, 640),
    "e6": Record(12, 80, 3, 1, 640, 640),
    "d6": Record(12, 96, 3, 1, 640, 640),
}


def compile_conv(target: str, *calls: ConvCall, **changes: int) -> Row:
    """The convolution kernel of one launch, with changes to its default config."""
    with recording(aot.capability_of(target)) as specs:
        config = {**default_config(calls), **changes}
        workspace = torch.empty(workspace_elements(calls, config), device="meta")
        launch_conv(calls, config, workspace)
    return compile_spec(specs[0], target, calls[0].layer.describe())


@pytest.mark.aot
@pytest.mark.parametrize("target", MATRIX)
def test_every_option_compiles_within_the_limits(target: str) -> None:
    rows = list(compile_all(target, {"batch": 2}, only=["conv"]))
    assert len(rows) >= len(SAMPLES) + 4
    assert not [f"{row.shape}: {limit}" for row in rows for limit in passed_limits(row)]
    kinds = {row.mma for row in rows if row.kernel != "conv_reduce_kernel"}
    assert kinds == {MATRIX[target]["fp16"]}


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "precision"),
    [(t, p) for t, kinds in MATRIX.items() for p in kinds if p != "fp16"],
)
def test_matrix_instructions_of_every_type(target: str, precision: str) -> None:
    layers = (CHAIN, replace(CHAIN, stride=2))
    calls = [meta_call(layer_of(r, 32), DTYPES[precision]) for r in layers]
    for call in calls:
        row = compile_conv(target, call)
        assert row.mma == MATRIX[target][precision]
        assert passed_limits(row) == []


@pytest.mark.aot
def test_hopper_reads_both_operands_through_descriptors() -> None:
    """What the pitched map is for; the strided gather keeps A in shared memory as well."""
    row = compile_conv("sm_90", meta_call(layer_of(CHAIN, 32), torch.float16))
    assert (row.kernel, row.mma_operand) == ("conv_tma_kernel", "shared")
    assert row.tma_loads >= 4
    strided = meta_call(layer_of(replace(CHAIN, stride=2), 32), torch.float16)
    row = compile_conv("sm_90", strided)
    assert (row.kernel, row.mma_operand) == ("conv_gather_kernel", "shared")


@pytest.mark.aot
@pytest.mark.parametrize("target", MATRIX)
def test_pooled_branch_beside_the_strided_one(target: str) -> None:
    """One launch multiplies as both do and takes the shared memory of the larger, in every type."""
    for precision, mma in MATRIX[target].items():
        records = (replace(CHAIN, stride=2), replace(CHAIN, kernel=1))
        layers = [layer_of(r, 32, pool=r.kernel == 1) for r in records]
        calls = [meta_call(layer, DTYPES[precision]) for layer in layers]
        with recording(aot.capability_of(target)):
            config = default_config(calls)
        both, *alone = (compile_conv(target, *g, **config) for g in (calls, *([c] for c in calls)))
        assert passed_limits(both) == []
        assert (both.mma, both.mma_count) == (mma, sum(row.mma_count for row in alone))
        assert both.shared_bytes == max(row.shared_bytes for row in alone)


@pytest.mark.aot
def test_exact_fp32_uses_no_matrix_instructions() -> None:
    row = compile_conv("sm_80", meta_call(layer_of(CHAIN, 2, exact=True), torch.float32))
    assert row.mma == ""
    assert row.local_bytes == 0
    assert passed_limits(replace(row, shape=row.shape + " exact")) == []


@pytest.mark.aot
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("target", MATRIX)
def test_exact_stem_uses_no_matrix_instructions(target: str, stem: str) -> None:
    """TF32 rounds each factor to 11 bits: alone, it takes a network to 5e-4 of its result."""
    call = stem_call(STEMS[stem], 1, torch.float32)
    call = replace(call, layer=replace(call.layer, exact=True))
    with recording(aot.capability_of(target)) as specs:
        bound(call, chosen_config(call))()
    row = compile_spec(specs[0], target, call_name(call))
    assert row.mma == ""
    assert passed_limits(row) == []


@pytest.mark.aot
@pytest.mark.parametrize("batch", [1, 32])
def test_nothing_became_worse(batch: int) -> None:
    """The regression check that needs no GPU.

    `make baselines` rewrites the tables where a change is meant.
    """
    version, baseline = load_table(BASELINES / f"aot-sm_90-yolov7-batch{batch}.json")
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, this is {triton.__version__}")
    rows = list(compile_all("sm_90", aot.workload("yolov7", batch, "fp16")))
    assert worse(rows, baseline) == []


@pytest.mark.aot
def test_planted_spill_and_shared_memory_are_caught() -> None:
    call = meta_call(layer_of(CHAIN, 32), torch.float16)
    spilled = compile_conv("sm_90", call, BLOCK_M=256, num_warps=4, num_stages=2)
    assert any("local memory" in limit for limit in passed_limits(spilled))
    large = compile_conv("sm_90", call, num_stages=6)
    assert any("bytes of shared memory, sm_90 has 232448" in text for text in passed_limits(large))


@pytest.mark.aot
def test_planted_loss_of_matrix_instructions_is_caught() -> None:
    good = compile_conv("sm_90", meta_call(layer_of(CHAIN, 2), torch.float32))
    lost = compile_conv("sm_90", meta_call(layer_of(CHAIN, 2, exact=True), torch.float32))
    lost = replace(lost, kernel=good.kernel, config=good.config)
    assert "no matrix instructions" in passed_limits(lost)
    assert any("HGMMA shared" in text for text in worse([lost], [good]))


ROW = Row("conv", "shape", "sm_90", "config", 100, 50_000, 0, "HGMMA", 4, "shared", 6, 1000)


@pytest.mark.parametrize(
    ("change", "caught"),
    [
        ({"instructions": 1100}, "instructions 1000 -> 1100"),
        ({"instructions": 1040, "registers": 104}, None),
        ({"instructions": 500, "registers": 50}, None),
        ({"registers": 106}, "registers 100 -> 106"),
        ({"local_bytes": 8}, "local_bytes 0 -> 8"),
        ({"shared_bytes": 60_000}, "shared_bytes 50000 -> 60000"),
        ({"mma_operand": "registers"}, "HGMMA registers"),
        ({"tma_loads": 0}, "0 TMA loads"),
        ({"shape": "another"}, "only in the table"),
    ],
)
def test_comparison_with_a_table(change: dict[str, Any], caught: str | None) -> None:
    found = worse([replace(ROW, **change)], [ROW])
    assert bool(found) == (caught is not None)
    assert caught is None or any(caught in line for line in found)


@pytest.fixture
def small_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line with one layer to compile."""

    def cases(*_: object) -> Iterator[tuple[str, Callable[[], None]]]:
        call = meta_call(layer_of(CHAIN, 1), torch.float16)
        yield "one layer", lambda: launch_conv([call], default_config([call]))

    monkeypatch.setattr(aot, "kernel_cases", cases)


@pytest.mark.aot
@pytest.mark.usefixtures("small_cases")
def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "rows.json"
    assert aot.main(["--target", "sm_90", "--json", str(path)]) == 0
    data = json.loads(path.read_text())
    assert data["totals"] == {"rows": 1, "over_limit": 0}
    expected = "kernel shape target config registers shared_bytes local_bytes mma tma_loads"
    assert set(expected.split()) | {"instructions"} <= data["rows"][0].keys()
    assert load_table(path)[1][0].kernel == "conv_tma_kernel"
    assert "one layer" in capsys.readouterr().out


@pytest.mark.aot
@pytest.mark.usefixtures("small_cases")
def test_command_line_fails_over_a_limit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(aot.SHARED_LIMITS, "sm_90", 1000)
    assert aot.main([]) == 1
    assert "over the limit: conv_tma_kernel one layer" in capsys.readouterr().err


def test_fp8_needs_a_target_that_has_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        aot.main(["--target", "sm_80", "--precision", "fp8"])
    assert "sm_80 has no fp8" in capsys.readouterr().err
    with pytest.raises(ValueError, match="'sm_70' is none of sm_80"):
        aot.capability_of("sm_70")
