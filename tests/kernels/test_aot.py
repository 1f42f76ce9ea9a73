"""What the compiler makes of the kernels, for GPUs that are not there."""

import itertools
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import triton

from tests.kernels.test_model import LARGE
from yolov7.engine.graph.workload import workload
from yolov7.kernels import aot, runtime
from yolov7.kernels.aot import Row, compile_all, compile_spec, load_table, passed_limits, worse
from yolov7.kernels.architectures import ARCHITECTURES
from yolov7.kernels.conv import ConvCall, ConvConfig, ConvLaunch, StemLaunch
from yolov7.kernels.conv.cases import SAMPLES, Record, layer_of, meta_call, stem_call
from yolov7.kernels.conv.layer import Activation
from yolov7.kernels.conv.search import search_space
from yolov7.kernels.runtime import FLOATS, PRECISIONS, CompileSpec, recording, unfit
from yolov7.variants import VARIANTS

ROOT = Path(__file__).parents[2]
BASELINES = ROOT / "bench" / "baselines"
MATRIX = {  # int8 has no instruction of its own in Triton for sm_100
    "sm_80": {"fp16": "HMMA", "bf16": "HMMA", "fp32": "HMMA", "int8": "IMMA"},
    "sm_89": {"fp16": "HMMA", "bf16": "HMMA", "fp32": "HMMA", "fp8": "QMMA", "int8": "IMMA"},
    "sm_90": {"fp16": "HGMMA", "bf16": "HGMMA", "fp32": "HGMMA", "fp8": "QGMMA", "int8": "IGMMA"},
    "sm_100": dict.fromkeys(FLOATS, "UTCHMMA") | {"fp8": "UTCQMMA", "int8": "IMMA"},
    "sm_120": {"fp16": "HMMA", "bf16": "HMMA", "fp32": "HMMA", "fp8": "QMMA", "int8": "IMMA"},
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


def compile_conv(
    target: str, *calls: ConvCall, config: ConvConfig | None = None, **changes: Any
) -> Row:
    """The convolution kernel of one launch, with changes to its config, by default its own."""
    with recording(aot.capability_of(target)) as specs:
        launch = ConvLaunch(calls)
        launch.prepare(replace(config or launch.chosen(), **changes))()
    return compile_spec(specs[0], target, calls[0].layer.describe())


@pytest.mark.proof
@pytest.mark.parametrize(
    ("target", "precision"),
    [(t, p) for t in aot.TARGETS for p in PRECISIONS if p in MATRIX.get(t, MATRIX["sm_80"])],
)
def test_the_whole_family_compiles_within_the_limits(target: str, precision: str) -> None:
    """Whatever the cost model chooses, at batch 1 and 32."""
    specs: dict[str, tuple[CompileSpec, str]] = {}  # most launches share theirs
    for variant, batch in itertools.product(VARIANTS, (1, 32)):
        for shape, case in aot.kernel_cases(workload(variant, batch, precision), ["conv"]):
            with recording(aot.capability_of(target)) as found:
                case()
            specs |= {repr(replace(spec, fn=spec.fn.__name__)): (spec, shape) for spec in found}
    assert len(specs) > 100
    passed = []
    for spec, shape in specs.values():
        row = compile_spec(spec, target, shape)
        passed += [f"{shape}, {row.config}: {limit}" for limit in passed_limits(row)]
    assert passed == []


@pytest.mark.aot
@pytest.mark.parametrize("target", MATRIX)
def test_every_option_compiles_within_the_limits(target: str) -> None:
    rows = list(compile_all(target, {"batch": 1}, only=["conv"]))
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
    calls = [meta_call(layer_of(r, 32), PRECISIONS[precision]) for r in layers]
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
        calls = [meta_call(layer, PRECISIONS[precision]) for layer in layers]
        with recording(aot.capability_of(target)):
            config = ConvLaunch(calls).chosen()
        groups = (calls, *([c] for c in calls))
        both, *alone = (compile_conv(target, *group, config=config) for group in groups)
        assert passed_limits(both) == []
        assert (both.mma, both.mma_count) == (mma, sum(row.mma_count for row in alone))
        assert both.shared_bytes == max(row.shared_bytes for row in alone)


@pytest.mark.aot
@pytest.mark.parametrize(
    ("activation", "flatten", "most"),
    [("silu", False, 7.0), ("silu", True, 11.5), ("leaky_relu", False, 6.0)],
)
def test_epilogue_is_short(activation: Activation, flatten: bool, most: float) -> None:
    """Instructions of a thread for each element that it finishes, product and store included."""
    record = Record(256, 256, 1, 1, 80, 80, activation)
    call = meta_call(layer_of(record, 1), torch.float16)
    config = replace(LARGE, flatten=flatten)
    wide, narrow = (compile_conv("sm_90", call, config=config, block_n=n) for n in (128, 64))
    elements = 128 * (128 - 64) / (32 * config.num_warps)
    assert (wide.instructions - narrow.instructions) / elements <= most


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
        launch = StemLaunch(call)
        launch.prepare()()
    row = compile_spec(specs[0], target, launch.name)
    assert row.mma == ""
    assert passed_limits(row) == []


@pytest.mark.aot
@pytest.mark.parametrize("stem", ["v7", "x", "d6"])
@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_stem_spills_nothing(stem: str, precision: str) -> None:
    """Where products pass through registers, so large tiles spill first."""
    call = stem_call(STEMS[stem], 1, PRECISIONS[precision])
    with recording((12, 0)) as specs:
        launch = StemLaunch(call)
        launch.prepare()()
    assert passed_limits(compile_spec(specs[0], "sm_120", launch.name)) == []


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_100", "sm_120"])
def test_split_group_spills_nothing(target: str) -> None:
    """Left alone, ptxas keeps to 128 registers, for a program that there is no memory for."""
    records = (Record(256, 128, 3, 1, 40, 40), Record(128, 256, 3, 1, 80, 80))
    row = compile_conv(target, *(meta_call(layer_of(r, 1), torch.float16) for r in records))
    assert passed_limits(row) == []


@pytest.mark.aot
@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize(("target", "precision"), [("sm_80", "int8"), ("sm_90", "fp16")])
def test_channels_that_no_block_fits_spill_nothing(
    target: str, precision: str, pooled: bool
) -> None:
    """Masks of loads take registers, too; so do the four of a pool, of two layers with them."""
    channels = 160 if pooled else 40
    layers = [layer_of(Record(channels, 160, 3, 2, 80, 80), 1)]
    if pooled:
        layers.append(layer_of(Record(channels, 160, 1, 1, 80, 80), 1, pool=True))
    calls = [meta_call(layer, PRECISIONS[precision]) for layer in layers]
    with recording(aot.capability_of(target)):
        found = {(c.block_m, c.block_n): c for c in search_space(calls) if c.split_k == 1}
    assert len(found) > 1
    rows = [compile_conv(target, *calls, config=config) for config in found.values()]
    assert [limit for row in rows for limit in passed_limits(row)] == []


@pytest.mark.aot
@pytest.mark.parametrize("stride", [1, 2], ids=["tma", "gather"])
@pytest.mark.parametrize("target", ["sm_90", "sm_100", "sm_120"])
def test_nothing_but_weights_is_asked_for_before_the_wait(target: str, stride: int) -> None:
    """What the kernel before writes is read behind ACQBULK; CCTL is a prefetch."""
    capability = aot.capability_of(target)
    call = meta_call(layer_of(Record(512, 512, 3, stride, 20, 20), 1), torch.float16)
    with recording(capability) as specs:
        ConvLaunch([call]).prepare()()
    before, behind = around_the_wait(specs[0], capability)
    assert "CCTL" in before
    assert "CCTL" not in behind
    assert not before & TOUCHING
    assert behind & TOUCHING


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
@pytest.mark.parametrize("file", ["letterbox", "pool", "concat", "decode", "nms"])
def test_nothing_is_touched_before_the_wait(file: str, target: str) -> None:
    capability = aot.capability_of(target)
    for _, case in aot.kernel_cases({}, [file]):
        with recording(capability) as specs:
            case()
        for spec in specs:
            before, behind = around_the_wait(spec, capability)
            assert not before & TOUCHING, spec.fn.__name__
            assert behind & TOUCHING, spec.fn.__name__


TOUCHING = {
    "LD",
    "ST",
    "LDG",
    "STG",
    "LDGSTS",
    "UTMALDG",
    "UTMASTG",
    "ATOM",
    "ATOMG",
    "RED",
    "REDG",
}


def around_the_wait(spec: CompileSpec, capability: tuple[int, int]) -> tuple[set[str], set[str]]:
    """Instructions before and behind the wait for the kernel before."""
    code = aot.instructions(aot.compiled_kernel(spec, capability).asm["cubin"])
    wait = code.index("ACQBULK")
    return {*code[:wait]}, {*code[wait:]}


@pytest.mark.aot
@pytest.mark.skipif(bool(unfit((10, 0))), reason="this Triton leaves the fences out")
@pytest.mark.parametrize("target", ["sm_90", "sm_100"])
def test_matrix_instructions_wait_for_what_was_copied(target: str) -> None:
    call = meta_call(layer_of(replace(CHAIN, stride=2), 1), torch.float16)
    with patch.object(aot, "unfenced", return_value=0) as counter:
        row = compile_conv(target, call)
    (ptx,) = counter.call_args.args
    assert row.kernel == "conv_gather_kernel"
    assert aot.unfenced(ptx) == 0
    planted = aot.unfenced(ptx.replace("fence.proxy.async", "//"))
    assert planted >= 4
    assert "behind cp.async" in passed_limits(replace(row, unfenced=planted))[0]


@pytest.mark.aot
@pytest.mark.parametrize(
    ("target", "batch"),
    [("sm_90", 1), ("sm_90", 32), ("sm_80", 1), ("sm_89", 1), ("sm_100", 1), ("sm_120", 1)],
)
def test_nothing_became_worse(target: str, batch: int) -> None:
    """The regression check that needs no GPU.

    `make baselines` rewrites the tables where a change is meant.
    """
    version, baseline = load_table(BASELINES / f"aot-{target}-yolov7-batch{batch}.json")
    if version != triton.__version__:
        pytest.skip(f"the table is of Triton {version}, this is {triton.__version__}")
    rows = list(compile_all(target, workload("yolov7", batch, "fp16")))
    assert worse(rows, baseline) == []


@pytest.mark.aot
@pytest.mark.parametrize("target", ["gfx942", "gfx1100"])
def test_portable_kernels_compile_for_amd(target: str) -> None:
    """With matrix instructions, within shared memory. No more is proven: none has run there."""
    command = [sys.executable, "-m", "tests.kernels.amd", target]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert {row["kernel"] for row in rows} >= {
        "conv_gather_kernel",
        "conv_reduce_kernel",
        "conv_stem_kernel",
        "decode_kernel",
        "nms_greedy_kernel",
        "_letterbox_kernel",
    }
    for row in rows:
        multiplies = row["kernel"].startswith(("conv_gather", "conv_stem", "decode"))
        assert (row["matrix"] > 0) == multiplies, row
        assert row["shared"] <= ARCHITECTURES[0, 0].shared_bytes, row
        large = target == "gfx1100" and "6x6" in row["shape"]  # the first layer of the P6 variants
        assert (row["spilled"] > 0) == large, row


@pytest.mark.aot
def test_planted_spill_and_shared_memory_are_caught() -> None:
    call = meta_call(layer_of(CHAIN, 32), torch.float16)
    spilled = compile_conv("sm_90", call, block_m=256, num_warps=4, num_stages=2)
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


ROW = Row("conv", "shape", "sm_90", "config", 100, 50_000, 0, "HGMMA", 4, "shared", 6, 0, 1000)


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


@pytest.mark.parametrize(
    ("version", "fit"),
    [
        ("3.6.0", False),
        ("3.7.1rc1", False),
        ("3.7.1", True),
        ("3.7.1+git0", True),
        ("3.10.0", True),
    ],
)
def test_tritons_that_leave_the_fences_out(
    version: str, fit: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime.triton, "__version__", version)
    assert (unfit((10, 0)) is None) == fit
    assert unfit((9, 0)) is None


def test_every_target_has_limits() -> None:
    assert all(aot.capability_of(target) in ARCHITECTURES for target in aot.TARGETS)


def test_target_without_known_limits_is_named() -> None:
    with pytest.raises(ValueError, match="'sm_70' is none of sm_80"):
        aot.capability_of("sm_70")
