"""The proofs of the kernels can fail: each of these faults, planted in a copy, is seen."""

from dataclasses import replace
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch

from tests.kernels.test_aot import CHAIN
from tests.kernels.test_conv import GATHER, TMA, assert_correct, call_of, layer_of, run
from yolov7.kernels import aot
from yolov7.kernels.conv import ConvConfig, ConvLaunch, cases, gather, launcher, parts, tma
from yolov7.kernels.runtime import INTERPRET, recording

INTERPRETED = pytest.mark.skipif(not INTERPRET, reason="a compiled kernel holds its helpers")
PATHS = {"gather": (GATHER, gather), "tma": (TMA, tma)}


def planted(module: ModuleType, old: str, new: str, folder: Path) -> ModuleType:
    """A copy of a module in which a piece of source is another."""
    source = Path(str(module.__file__)).read_text()
    assert source.count(old) == 1
    path = folder / Path(str(module.__file__)).name
    path.write_text(source.replace(old, new))
    spec = spec_from_file_location(f"planted_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    copy = module_from_spec(spec)
    spec.loader.exec_module(copy)
    return copy


def check(config: ConvConfig, device: torch.device) -> None:
    """What the tests of the convolution do: slices among NaN, two images, odd sizes."""
    call = call_of(layer_of(2, 5, 6, 24, 24, kernel=3), device, torch.float16, slices=True)
    run(call, config)
    assert_correct(call)


@INTERPRETED
@pytest.mark.interpreter
@pytest.mark.parametrize("path", PATHS)
def test_wrong_border(
    path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    config, module = PATHS[path]
    old, new = "return _zero_unless(inside, acc.to(DTYPE), DTYPE)", "return acc.to(DTYPE)"
    broken = planted(parts, old, new, tmp_path)
    name = "store_rows" if path == "gather" else "to_output"
    monkeypatch.setattr(module, name, getattr(broken, name))
    with pytest.raises(AssertionError, match="border"):
        check(config, kernel_device)


@INTERPRETED
@pytest.mark.interpreter
def test_store_without_its_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    old = "tl.store(out_ptrs, values, mask=mask)"
    new = "tl.store(out_ptrs, values, mask=(offs_m < shape.rows)[:, None])"
    broken = planted(parts, old, new, tmp_path)
    monkeypatch.setattr(gather, "store_rows", broken.store_rows)
    with pytest.raises(AssertionError):
        check(GATHER, kernel_device)


@INTERPRETED
@pytest.mark.interpreter
def test_load_without_its_mask(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel_device: torch.device
) -> None:
    old = "tl.load(x_ptrs, mask=(offs_k < shape.c_in)[None, :], other=0.0)"
    broken = planted(gather, old, "tl.load(x_ptrs)", tmp_path)
    monkeypatch.setattr(launcher, "conv_gather_kernel", broken.conv_gather_kernel)
    with pytest.raises(AssertionError, match="nan"):
        check(GATHER, kernel_device)


@pytest.mark.aot
def test_more_instructions(tmp_path: Path) -> None:
    call = cases.meta_call(cases.layer_of(CHAIN, 2), torch.float16)
    with recording((8, 0)) as specs:
        ConvLaunch([call]).prepare()()
    old = "acc = multiply(a, b, acc, PRECISION, PROMOTE)"
    more = f"{old}\n        acc *= tl.sqrt(acc * acc + 1.0)"
    slow = planted(gather, old, more, tmp_path)
    good = aot.compile_spec(specs[0], "sm_80")
    bad = aot.compile_spec(replace(specs[0], fn=slow.conv_gather_kernel), "sm_80")
    assert bad.instructions > 1.1 * good.instructions
    assert any("instructions" in line for line in aot.worse([bad], [good]))
