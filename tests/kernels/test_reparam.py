from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from yolov7.blocks import RepConv
from yolov7.kernels import reparam as kernel
from yolov7.kernels.aot import SHARED_LIMITS, compile_all, passed_limits
from yolov7.kernels.reparam import reparam


def make_branches(out: int, inputs: int, identity: bool) -> dict[str, Any]:
    random = torch.Generator().manual_seed(out)

    def norm() -> Tensor:
        values = torch.randn(4, out, generator=random)
        values[3] = values[3].abs() + 0.5
        return values

    return {
        "dense": torch.randn(out, inputs, 3, 3, generator=random) / (9 * inputs) ** 0.5,
        "pointwise": torch.randn(out, inputs, 1, 1, generator=random) / inputs**0.5,
        "dense_norm": norm(),
        "pointwise_norm": norm(),
        "identity_norm": norm() if identity else None,
    }


def three_branches(x: Tensor, branches: dict[str, Any], eps: float) -> Tensor:
    def normed(y: Tensor, norm: Tensor | None) -> Tensor:
        if norm is None:
            return torch.zeros(())
        scale, shift, mean, variance = norm
        return F.batch_norm(y, mean, variance, scale, shift, eps=eps)

    dense = normed(F.conv2d(x, branches["dense"], padding=1), branches["dense_norm"])
    pointwise = normed(F.conv2d(x, branches["pointwise"]), branches["pointwise_norm"])
    return dense + pointwise + normed(x, branches["identity_norm"])


@pytest.mark.interpreter
@pytest.mark.parametrize(
    ("out", "inputs", "identity"), [(5, 7, False), (8, 8, True), (1, 1, True), (3, 300, False)]
)
@pytest.mark.usefixtures("poisoned_memory")
def test_one_convolution_equals_three(
    out: int, inputs: int, identity: bool, kernel_device: torch.device
) -> None:
    branches = make_branches(out, inputs, identity)
    on_device: dict[str, Any] = {
        k: v if v is None else v.to(kernel_device) for k, v in branches.items()
    }
    weight, bias = reparam(**on_device, eps=0.01)
    x = torch.randn(2, inputs, 6, 5)
    folded = weight.cpu().view(out, 3, 3, inputs).permute(0, 3, 1, 2)
    y = F.conv2d(x, folded, bias.cpu(), padding=1)
    torch.testing.assert_close(y, three_branches(x, branches, 0.01), rtol=1e-5, atol=1e-5)


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rounded_once(dtype: torch.dtype, kernel_device: torch.device) -> None:
    branches = make_branches(6, 6, True)
    branches = {k: v.to(kernel_device) for k, v in branches.items()}
    exact, bias = reparam(**branches)
    weight, same_bias = reparam(**branches, dtype=dtype)
    assert weight.dtype == dtype
    assert torch.equal(bias, same_bias)
    rounding = 2**-8 if dtype == torch.bfloat16 else 2**-11
    rounding *= 2 if dtype == torch.bfloat16 else 1  # which the interpreter truncates
    torch.testing.assert_close(weight.float(), exact, rtol=rounding, atol=1e-7)


@pytest.mark.parametrize("inputs", [8, 12])
def test_same_as_the_module(inputs: int) -> None:
    block = RepConv(inputs, 8, "silu").eval()
    for norm in block.modules():
        if isinstance(norm, torch.nn.BatchNorm2d):
            for values in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
                assert values is not None
                values.uniform_(0.5, 1.5)
    state = block.state_dict()

    def norm_of(name: str) -> Tensor:
        fields = ("weight", "bias", "running_mean", "running_var")
        return torch.stack([state[f"{name}.{field}"] for field in fields])

    weight, bias = reparam(
        state["dense.0.weight"], state["pointwise.0.weight"], norm_of("dense.1"),
        norm_of("pointwise.1"), norm_of("identity") if inputs == 8 else None,
    )  # fmt: skip
    block.fuse()
    assert block.conv is not None
    assert block.conv.bias is not None
    folded = block.conv.weight.permute(0, 2, 3, 1).flatten(1)
    torch.testing.assert_close(weight, folded.detach())
    torch.testing.assert_close(bias, block.conv.bias.detach())


def test_operation() -> None:
    branches = make_branches(4, 4, True)
    torch.library.opcheck(kernel._reparam_op, (*branches.values(), 1e-3, torch.float16))


def test_compiles_as_one_graph() -> None:
    branches = make_branches(4, 4, True)
    compiled: Callable[..., Any] = torch.compile(reparam, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(**branches), reparam(**branches), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dense": torch.ones(4, 4, 1, 1)}, r"weights are \[4, 4, 1, 1\]"),
        ({"pointwise": torch.ones(4, 5, 1, 1)}, r"and \[4, 5, 1, 1\]"),
        ({"pointwise": torch.ones(4, 4, 1, 1).half()}, r"and torch\.float16"),
        ({"dense_norm": torch.ones(4, 5)}, r"\[4, 5\], not fp32 \[4, 4\]"),
        ({"dtype": torch.int8}, r"become torch\.int8"),
    ],
)
def test_wrong_input(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reparam(**{**make_branches(4, 4, True), **change})


def test_identity_needs_equal_channels() -> None:
    branches = make_branches(4, 6, True)
    with pytest.raises(ValueError, match="no identity from 6 to 4 channels"):
        reparam(**branches)


@pytest.mark.aot
@pytest.mark.parametrize("target", SHARED_LIMITS)
def test_compiles_within_the_limits(target: str) -> None:
    rows = list(compile_all(target, {}, only=["reparam"]))
    assert {row.kernel for row in rows} == {"_reparam_kernel"}
    assert not [f"{row.shape}: {limit}" for row in rows for limit in passed_limits(row)]
