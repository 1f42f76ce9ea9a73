import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.kernels import COMPILED
from yolov7.kernels import bn_silu as kernel
from yolov7.kernels.aot import compile_all, passed_limits
from yolov7.kernels.bn_silu import batch_norm_act
from yolov7.kernels.runtime import INTERPRET

# Of values and gradients of O(1). bf16 is truncated by the interpreter.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "leaky_relu": lambda z: F.leaky_relu(z, 0.1),
    "none": lambda z: z,
}


def make_input(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(shape[1])
    c = shape[1]
    return {
        "x": (torch.randn(shape, generator=random) * 2 + 0.5).to(device, dtype),
        "weight": (torch.randn(c, generator=random) + 1).to(device),
        "bias": torch.randn(c, generator=random).to(device),
        "running_mean": torch.randn(c, generator=random).to(device),
        "running_var": (torch.rand(c, generator=random) + 0.5).to(device),
    }


def expected(
    arguments: dict[str, Any], dy: Tensor, training: bool, activation: str
) -> tuple[list[Tensor], list[Tensor]]:
    """By PyTorch in fp64: y, dx, dweight, dbias; the running statistics afterwards."""
    values = {name: value.detach().double().clone() for name, value in arguments.items()}
    leaves = [values[name].requires_grad_() for name in ("x", "weight", "bias")]
    z = F.batch_norm(
        values["x"], values["running_mean"], values["running_var"], values["weight"],
        values["bias"], training, 0.03, 1e-3,
    )  # fmt: skip
    y = ACTIVATIONS[activation](z)
    gradients = torch.autograd.grad(y, leaves, dy.double())
    return [y, *gradients], [values["running_mean"], values["running_var"]]


def assert_near(found: Tensor, exact: Tensor, tolerance: float, name: str) -> None:
    assert found.isfinite().all(), name
    scale = max(float(exact.detach().abs().max()), 1.0)
    error = float((found.detach().double().cpu() - exact.detach().cpu()).abs().max())
    assert error <= tolerance * scale, f"{name}: {error} of {scale}"


@pytest.mark.interpreter
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(
    ("shape", "dtype", "activation"),
    [
        ((2, 24, 7, 9), torch.float32, "silu"),
        ((3, 63, 5, 1), torch.float32, "leaky_relu"),
        ((1, 1, 1, 2), torch.float32, "silu"),
        ((2, 70, 13, 11), torch.float16, "silu"),
        ((2, 16, 6, 5), torch.bfloat16, "leaky_relu"),
    ],
)
@pytest.mark.usefixtures("poisoned_memory")
def test_forward_and_backward(
    shape: tuple[int, ...],
    dtype: torch.dtype,
    activation: str,
    training: bool,
    kernel_device: torch.device,
) -> None:
    arguments = make_input(shape, dtype, kernel_device)
    dy = torch.randn(shape).to(kernel_device, dtype)
    exact, running = expected(arguments, dy, training, activation)
    leaves = [arguments[name].requires_grad_() for name in ("x", "weight", "bias")]
    y = batch_norm_act(**arguments, training=training, activation=activation)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    found = [y, *torch.autograd.grad(y, leaves, dy)]
    names = ("y", "dx", "dweight", "dbias")
    for name, value, right in zip(names, found, exact, strict=True):
        assert_near(value, right, TOLERANCE[dtype], name)
    for name, right in zip(("running_mean", "running_var"), running, strict=True):
        assert_near(arguments[name], right, 1e-5, name)


@pytest.mark.interpreter
def test_large_mean_costs_no_digits(kernel_device: torch.device) -> None:
    x = (torch.randn(2000, 3) * 0.1 + 1000).to(kernel_device)
    stats = kernel._stats_op(x, None, None, 0.0).cpu()
    assert stats[0].tolist() == [2000] * 3
    exact = x.cpu().double()
    torch.testing.assert_close(stats[1].double(), exact.mean(0), rtol=1e-7, atol=0)
    variance = exact.var(0, correction=0)
    torch.testing.assert_close(stats[2].double() / 2000, variance, rtol=1e-4, atol=0)


@pytest.mark.interpreter
def test_statistics_of_parts_merge(kernel_device: torch.device) -> None:
    x = torch.randn(90, 18).to(kernel_device)
    parts = [kernel._stats_op(part, None, None, 0.0) for part in x.split([1, 50, 39])]
    mean, var = torch.zeros(18).to(kernel_device), torch.ones(18).to(kernel_device)
    merged = kernel._merge_op(torch.stack(parts), mean, var, 0.5)
    whole = kernel._stats_op(x, None, None, 0.0)
    torch.testing.assert_close(merged, whole, rtol=1e-5, atol=1e-5)  # sums in another order
    torch.testing.assert_close(mean, x.mean(0) / 2)
    torch.testing.assert_close(var, 0.5 + x.var(0) / 2)


@pytest.mark.skipif(INTERPRET, reason="kernels compute in fp32; this is about the formulas")
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_of_the_reference(activation: str, training: bool) -> None:
    arguments = {k: v.double() for k, v in make_input((2, 3, 2, 3), torch.float64).items()}
    running: dict[str, Any] = {
        name: arguments.pop(name) for name in ("running_mean", "running_var")
    }

    def call(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return batch_norm_act(
            x, weight, bias, running["running_mean"].clone(), running["running_var"].clone(),
            training=training, activation=activation,
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, [v.requires_grad_() for v in arguments.values()])


class TwoRanks:
    """torch.distributed for two threads of one process: what one hands in, the other gets."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._handed: dict[int, Tensor] = {}
        self._rank = threading.local()

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._handed[self._rank.value] = tensor.clone()
        self._barrier.wait()
        both = [self._handed[0], self._handed[1]]
        self._barrier.wait()
        return both

    def get_world_size(self, group: object) -> int:  # noqa: ARG002 - as in torch.distributed
        return 2

    def all_gather(self, out: list[Tensor], tensor: Tensor, group: object) -> None:  # noqa: ARG002 - as in torch.distributed
        for target, source in zip(out, self._exchange(tensor), strict=True):
            target.copy_(source)

    def all_reduce(self, tensor: Tensor, group: object) -> None:  # noqa: ARG002 - as in torch.distributed
        tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))

    def run(self, function: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
        def start(rank: int) -> list[Tensor]:
            self._rank.value = rank
            return function(rank)

        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(start, range(2)))


@pytest.mark.skipif(INTERPRET, reason="Triton's interpreter is not for two threads")
def test_processes_normalise_together(monkeypatch: pytest.MonkeyPatch) -> None:
    dy = torch.randn(3, 5, 4, 4, generator=torch.Generator().manual_seed(0))
    exact, running = expected(make_input((3, 5, 4, 4), torch.float32), dy, True, "silu")
    ranks = TwoRanks()
    monkeypatch.setattr(kernel, "dist", ranks)

    def one(rank: int) -> list[Tensor]:
        arguments = make_input((3, 5, 4, 4), torch.float32)
        mine = slice(0, 1) if rank == 0 else slice(1, 3)  # batches of different sizes
        x = arguments.pop("x")[mine].requires_grad_()
        leaves = [x, *(arguments[name].requires_grad_() for name in ("weight", "bias"))]
        group: Any = "both"
        y = batch_norm_act(x, **arguments, training=True, group=group)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy[mine]), arguments["running_var"]]

    first, second = ranks.run(one)
    found = [torch.cat(pair) for pair in zip(first[:2], second[:2], strict=True)]
    found += [a + b for a, b in zip(first[2:4], second[2:4], strict=True)]
    for name, value, right in zip(("y", "dx", "dweight", "dbias"), found, exact, strict=True):
        assert_near(value, right, 2e-5, name)
    for var in (first[4], second[4]):
        assert_near(var, running[1], 1e-5, "running_var")


def test_same_as_the_layers() -> None:
    arguments = make_input((2, 6, 5, 4), torch.float32)
    norm = nn.BatchNorm2d(6, eps=1e-3, momentum=0.03)
    norm.load_state_dict({k: v for k, v in arguments.items() if k != "x"}, strict=False)
    right = F.silu(norm(arguments["x"]))
    torch.testing.assert_close(batch_norm_act(**arguments, training=True), right)


def test_operations() -> None:
    x, dy = torch.randn(12, 5), torch.randn(12, 5)
    vectors = [torch.rand(5) + 0.5 for _ in range(4)]
    stats = kernel._stats_op(x, None, None, 0.0)
    affine, options = (stats, *vectors[2:]), (1e-3, "silu")
    sums = kernel._sums_op(dy, x, *affine, *options)
    torch.library.opcheck(kernel._stats_op, (x, *vectors[:2], 0.1))
    torch.library.opcheck(kernel._merge_op, (stats[None], *vectors[:2], 0.1))
    torch.library.opcheck(kernel._forward_op, (x, *affine, *options))
    torch.library.opcheck(kernel._sums_op, (dy, x, *affine, *options))
    torch.library.opcheck(kernel._backward_op, (dy, x, *affine, sums, *options))


def test_compiles_as_one_graph() -> None:
    compiled: Callable[..., Tensor] = torch.compile(
        batch_norm_act, fullgraph=True, backend="aot_eager"
    )
    results = []
    for call in (batch_norm_act, compiled):
        arguments = make_input((2, 6, 3, 4), torch.float32)
        leaves = [arguments[name].requires_grad_() for name in ("x", "weight", "bias")]
        y = call(**arguments, training=True)
        gradients = torch.autograd.grad(y.square().sum(), leaves)
        results.append([y, *gradients, arguments["running_mean"]])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.ones(2, 3)}, r"torch\.float32 \[2, 3\], not \[B, C, H, W\]"),
        ({"x": torch.ones(2, 3, 4, 4).int()}, r"input is torch\.int32"),
        ({"weight": torch.ones(4)}, r"parameters \[4\] on cpu for \[2, 3, 4, 4\]"),
        ({"activation": "relu"}, "activation 'relu' is none of"),
        ({"x": torch.ones(1, 3, 1, 1)}, r"one value per channel, or none, .* \[1, 3, 1, 1\]"),
        ({"x": torch.ones(0, 3, 4, 4)}, "one value per channel, or none"),
    ],
)
def test_wrong_input(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = make_input((2, 3, 4, 4), torch.float32)
    with pytest.raises(ValueError, match=message):
        batch_norm_act(**{**arguments, "training": True, **change})


def test_empty_evaluation_batch() -> None:
    arguments = make_input((0, 3, 4, 4), torch.float32)
    assert batch_norm_act(**arguments, training=False).shape == (0, 3, 4, 4)


@pytest.mark.aot
@pytest.mark.parametrize("target", COMPILED)
def test_compiles_within_the_limits(target: str) -> None:
    rows = list(compile_all(target, {}, only=["bn_silu"]))
    assert {row.kernel for row in rows} == {
        f"{name}_kernel" for name in ("stats", "merge", "forward", "sums", "backward")
    }
    assert not [f"{row.shape}: {limit}" for row in rows for limit in passed_limits(row)]
