from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels import COMPILED
from yolov7.blocks import Conv, RepConv
from yolov7.kernels import reparam as kernel
from yolov7.kernels.aot import compile_all, passed_limits
from yolov7.kernels.reparam import reparam, reparam_reference
from yolov7.kernels.runtime import INTERPRET

Branches = dict[str, Tensor | None]


def make_branches(
    out: int, inputs: int, identity: bool, side: int = 3, dtype: torch.dtype = torch.float32
) -> Branches:
    random = torch.Generator().manual_seed(out)

    def norm() -> Tensor:
        values = torch.randn(4, out, generator=random, dtype=torch.float64)
        values[3] = values[3].abs() + 0.5
        return values

    def weight(side: int) -> Tensor:
        values = torch.randn(out, inputs, side, side, generator=random)
        return (values / (side**2 * inputs) ** 0.5).to(dtype)

    return {
        "dense": weight(side),
        "dense_norm": norm(),
        "pointwise": weight(1),
        "pointwise_norm": norm(),
        "identity_norm": norm() if identity else None,
    }


def on(device: torch.device, branches: Branches) -> dict[str, Any]:
    return {k: v if v is None else v.to(device) for k, v in branches.items()}


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.cpu() - expected).abs().max() / expected.abs().max())


def one_by_one(x: Tensor, branches: Branches) -> Tensor:
    def normed(y: Tensor, name: str) -> Tensor:
        norm = branches[f"{name}_norm"]
        if norm is None:
            return torch.zeros(())
        scale, shift, mean, variance = norm.float()
        return F.batch_norm(y, mean, variance, scale, shift, eps=0.0)

    dense, pointwise = branches["dense"], branches["pointwise"]
    assert dense is not None
    y = normed(F.conv2d(x, dense, padding=dense.shape[2] // 2), "dense") + normed(x, "identity")
    return y if pointwise is None else y + normed(F.conv2d(x, pointwise), "pointwise")


SHAPES = pytest.mark.parametrize(
    ("out", "inputs", "identity", "side"),
    [(5, 7, False, 3), (8, 8, True, 3), (1, 1, True, 3), (3, 300, False, 3), (6, 6, True, 1)],
)


@SHAPES
def test_reference_is_the_sum_of_the_branches(
    out: int, inputs: int, identity: bool, side: int
) -> None:
    branches = make_branches(out, inputs, identity, side)
    x = torch.randn(2, inputs, 6, 5)
    weight, bias = reparam_reference(**branches)  # type: ignore[arg-type]  # by their names
    y = F.conv2d(x, weight, bias, padding=side // 2)
    torch.testing.assert_close(y, one_by_one(x, branches), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@SHAPES
@pytest.mark.usefixtures("poisoned_memory")
def test_same_as_the_fold_in_fp64(
    out: int, inputs: int, identity: bool, side: int, kernel_device: torch.device
) -> None:
    """Whatever of the branches there are."""
    branches = make_branches(out, inputs, identity, side)
    for absent in ((), ("pointwise", "pointwise_norm"), ("identity_norm",)):
        present = {**branches, **dict.fromkeys(absent)}
        for found, expected in zip(
            reparam(**on(kernel_device, present)),
            reparam_reference(**present),  # type: ignore[arg-type]  # by their names
            strict=True,
        ):
            assert found.dtype == torch.float32
            assert relative(found, expected) <= 1e-6


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_once(dtype: torch.dtype, kernel_device: torch.device) -> None:
    if INTERPRET and dtype == torch.bfloat16:
        pytest.skip("the interpreter cannot cast between bf16 and fp64")
    branches = make_branches(6, 6, True, dtype=dtype)
    weight, bias = reparam(**on(kernel_device, branches))
    wide = {k: v if v is None else v.double() for k, v in branches.items()}
    exact, exact_bias = reparam_reference(**wide)  # type: ignore[arg-type]  # by their names
    assert weight.dtype == bias.dtype == dtype
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    torch.testing.assert_close(weight.cpu().double(), exact, rtol=rounding, atol=1e-7)
    torch.testing.assert_close(bias.cpu().double(), exact_bias, rtol=rounding, atol=1e-7)


@pytest.mark.interpreter
@pytest.mark.parametrize("make", [lambda: Conv(7, 9, 3, 2, "silu"), lambda: RepConv(8, 8, "silu")])
def test_blocks_fold_themselves_on_the_device(
    make: Callable[[], Conv | RepConv], kernel_device: torch.device
) -> None:
    block = make().eval()
    for norm in block.modules():
        if isinstance(norm, nn.BatchNorm2d):
            for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                assert values is not None
                values.uniform_(0.5, 1.5)
    block = block.to(kernel_device)
    x = torch.randn(2, 7 if isinstance(block, Conv) else 8, 6, 5, device=kernel_device)
    with torch.no_grad():
        expected = block(x)
        block.fuse()
        assert not any(isinstance(module, nn.BatchNorm2d) for module in block.modules())
        torch.testing.assert_close(block(x), expected, rtol=1e-4, atol=1e-4)


def test_operation() -> None:
    branches = make_branches(4, 4, True)
    torch.library.opcheck(kernel._reparam_op, tuple(branches.values()))
    branches |= {"pointwise": None, "pointwise_norm": None, "identity_norm": None}
    torch.library.opcheck(kernel._reparam_op, tuple(branches.values()))


def test_compiles_as_one_graph() -> None:
    branches: dict[str, Any] = make_branches(4, 4, True)
    compiled: Callable[..., Any] = torch.compile(reparam, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(**branches), reparam(**branches), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": torch.ones(4, 4, 2, 2)}, r"a weight of \[4, 4, 2, 2\]"),
        ({"dense": torch.ones(4, 4, 3, 3).int()}, r"a weight of torch\.int32"),
        ({"pointwise": torch.ones(4, 5, 1, 1)}, r"\[4, 5, 1, 1\], not a 1x1 of it"),
        ({"pointwise": torch.ones(4, 4, 1, 1).half()}, r"stands torch\.float16"),
        ({"pointwise": None}, "needs its weight and its norm"),
        ({"dense_norm": torch.ones(4, 5).double()}, r"\[4, 5\], not fp64 \[4, 4\]"),
        ({"identity_norm": torch.ones(4, 4)}, r"a norm is torch\.float32"),
        ({"dense_norm": torch.ones(4, 4, device="meta").double()}, "is not on cpu"),
    ],
)
def test_wrong_input(change: dict[str, Any], message: str) -> None:
    branches: dict[str, Any] = {**make_branches(4, 4, True), **change}
    with pytest.raises(ValueError, match=message):
        reparam(**branches)


def test_identity_needs_equal_channels() -> None:
    branches: dict[str, Any] = make_branches(4, 6, True)
    with pytest.raises(ValueError, match="no identity from 6 to 4 channels"):
        reparam(**branches)


@pytest.mark.aot
@pytest.mark.parametrize("target", COMPILED)
def test_compiles_within_the_limits(target: str) -> None:
    rows = list(compile_all(target, {}, only=["reparam"]))
    assert {row.kernel for row in rows} == {"_reparam_kernel"}
    assert not [f"{row.shape}: {limit}" for row in rows for limit in passed_limits(row)]
