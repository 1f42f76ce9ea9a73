import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from yolov7.errors import UserError
from yolov7.kernels.bn_silu import batch_norm_act as original
from yolov7.model import YOLOv7, create_model
from yolov7.train import norm
from yolov7.train.distributed import Ranks, use_kernels
from yolov7.train.loop import train
from yolov7.train.norm import NormAct, join_norms, why_not_fused
from yolov7.train.options import Train


@pytest.mark.parametrize("variant", ["yolov7-tiny", "yolov7-tiny-silu"])
def test_joined_norms_train_as_the_plain_ones(variant: str) -> None:
    """In fp64, where no rounding flips a maximum: outputs, gradients and statistics."""
    torch.manual_seed(0)
    plain = create_model(variant, 2, width=0.125).double().train()
    joined = copy.deepcopy(plain)
    join_norms(joined)
    assert sum(isinstance(m, NormAct) for m in joined.modules()) == 55
    assert list(joined.state_dict()) == list(plain.state_dict())
    images = torch.rand(2, 3, 64, 64, dtype=torch.float64)
    for model in (plain, joined):
        outputs = model(images)
        assert isinstance(outputs, list)
        torch.stack([x.square().mean() for x in outputs]).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), joined.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        error = (p.grad - q.grad).abs().max() / p.grad.abs().max()
        assert error < 1e-6, f"{name}: {error:.1e}"
    for (name, a), b in zip(plain.named_buffers(), joined.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-12, msg=name)
    with torch.no_grad():
        decoded = [model.eval()(images) for model in (plain, joined)]
    torch.testing.assert_close(*decoded, rtol=1e-7, atol=1e-7)


def test_tensors_are_taken_over_not_copied() -> None:
    model = create_model("yolov7-tiny", 2, width=0.125)
    weights = {name: p.data_ptr() for name, p in model.named_parameters()}
    join_norms(model)
    join_norms(model)
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == weights


@pytest.fixture
def tiny() -> YOLOv7:
    torch.manual_seed(0)
    return create_model("yolov7-tiny", 2, width=0.125)


SHAPE = (2, 3, 64, 64)
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def broken(*_: Any, **__: Any) -> Tensor:
    raise RuntimeError("ptxas fatal: unresolved symbol\nand forty lines more")


def scaled(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return original(x, *rest, **options) * 1.01


def not_a_number(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return original(x, *rest, **options) * torch.nan


class _WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        return gradients[0] * 1.05


def wrong_gradient(x: Tensor, *rest: Any, **options: Any) -> Tensor:
    return original(_WrongGradient.apply(x), *rest, **options)  # type: ignore[no-untyped-call]  # torch's is untyped


STANDINS: dict[str, tuple[Callable[..., Tensor], str]] = {
    "fails": (broken, "RuntimeError: ptxas fatal: unresolved symbol"),
    "differs": (scaled, "the output of stem.0.bn differs from PyTorch's by 1.0e-02, more than"),
    "nan": (not_a_number, "the output of stem.0.bn differs from PyTorch's by nan, more than"),
    "gradient": (wrong_gradient, "the gradient of .* differs from PyTorch's by 5.0e-02, more than"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_fused_operation_is_taken_where_it_agrees(tiny: YOLOv7, dtype: torch.dtype) -> None:
    before = {name: tensor.clone() for name, tensor in tiny.state_dict().items()}
    assert why_not_fused(tiny, SHAPE, dtype) == ""
    assert why_not_fused(create_model("yolov7-tiny-silu", 2, width=0.125), SHAPE, dtype) == ""
    for name, tensor in tiny.state_dict().items():
        assert torch.equal(tensor, before[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("standin", STANDINS)
def test_why_the_fused_operation_is_not_taken(
    standin: str, dtype: torch.dtype, tiny: YOLOv7, monkeypatch: pytest.MonkeyPatch
) -> None:
    operation, reason = STANDINS[standin]
    monkeypatch.setattr(norm, "batch_norm_act", operation)
    found = why_not_fused(tiny, SHAPE, dtype)
    assert "\n" not in found
    with pytest.raises(UserError, match=f"^--kernels on: {reason}.*: use auto or off$"):
        use_kernels("on", CPU, lambda: found, Ranks())


def test_kernels_that_fail_are_one_warning(
    options: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def why_not() -> str:
        asked.append(1)
        return "no compiler"

    asked: list[int] = []
    assert not use_kernels("auto", CUDA, why_not, Ranks())
    assert capsys.readouterr().out == (
        "warning: norms and activations run by PyTorch, not by our kernels: no compiler\n"
    )
    assert not use_kernels("off", CUDA, why_not, Ranks())
    assert not use_kernels("auto", CPU, why_not, Ranks())
    assert len(asked) == 1
    assert use_kernels("auto", CUDA, lambda: "", Ranks())
    assert not capsys.readouterr().out

    monkeypatch.setattr(norm, "batch_norm_act", broken)
    with pytest.raises(UserError, match="--kernels on: RuntimeError: ptxas"):
        train(replace(options, kernels="on"))
    assert not Path(options.project).exists()


def test_training_by_the_kernels_references(options: Train) -> None:
    """What the kernels compute, by way of the whole run: the curve of PyTorch's norms."""
    rows = []
    for kernels in ("on", "off"):
        result = train(replace(options, kernels=kernels, name=kernels, epochs=1))
        rows.append(result.stats)
    for name in ("val_box", "val_objectness", "val_classes"):
        assert rows[0][name] == pytest.approx(rows[1][name], rel=1e-3)
