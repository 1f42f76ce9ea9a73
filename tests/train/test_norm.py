import copy

import pytest
import torch

from yolov7.model import create_model
from yolov7.train.norm import NormAct, join_norms


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
