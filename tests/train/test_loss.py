import pytest
import torch

from tests.train.test_assigner import ANCHORS, NC, batch, no_synchronisation
from yolov7.train.assigner import pad_labels
from yolov7.train.loss import LossWeights, build_loss, complete_iou

FORMS = {
    "plain": {"auxiliary": False, "ota": False},
    "ota": {"auxiliary": False, "ota": True},
    "auxiliary": {"auxiliary": True},
}
WEIGHTS = LossWeights(0.05, 0.7, 0.3)


@pytest.fixture(autouse=True)
def _two_levels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("yolov7.train.loss.OBJECTNESS_BALANCE", {2: (4.0, 1.0)})


def outputs(seed: int, form: str, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    raw = batch(seed)[0] + (batch(seed + 1)[0] if form == "auxiliary" else [])
    return [x.to(dtype).requires_grad_() for x in raw]


def total(terms: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.stack(list(WEIGHTS.weigh(terms).values())).sum()


@pytest.mark.parametrize("form", FORMS)
def test_fixed_capacity_gives_the_same_loss_and_gradients(form: str) -> None:
    labels = batch(0)[1]
    gradients = []
    for capacity in (None, 300):
        raw = outputs(0, form)
        terms = build_loss(ANCHORS, NC, capacity=capacity, **FORMS[form])(raw, labels)
        total(terms).backward()
        gradients.append([x.grad for x in raw])
        assert int(terms["overflow"]) == 0
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("form", FORMS)
def test_loss_never_waits_for_the_device(form: str) -> None:
    raw, labels = outputs(0, form), batch(0)[1]
    loss = build_loss(ANCHORS, NC, capacity=50, **FORMS[form])
    with no_synchronisation():
        total(loss(raw, labels)).backward()


@pytest.mark.parametrize("form", FORMS)
def test_a_batch_without_boxes_trains_objectness_only(form: str) -> None:
    raw = outputs(0, form)
    terms = build_loss(ANCHORS, NC, **FORMS[form])(raw, pad_labels([torch.zeros(0, 5)] * 2))
    total(terms).backward()
    assert terms["box"] == terms["classes"] == terms["matches"] == 0
    assert terms["objectness"] > 0
    for x in raw:
        assert x.grad is not None
        assert x.grad[..., 4].abs().min() > 0
        assert x.grad[..., :4].abs().max() == x.grad[..., 5:].abs().max() == 0


def test_half_precision_outputs_are_computed_in_fp32() -> None:
    raw, labels = outputs(0, "ota", torch.bfloat16), batch(0)[1]
    loss = build_loss(ANCHORS, NC, **FORMS["ota"])
    terms = loss(raw, labels)
    exact = loss([x.detach().float() for x in raw], labels)
    assert {x.dtype for x in WEIGHTS.weigh(terms).values()} == {torch.float32}
    torch.testing.assert_close(terms, exact, rtol=0, atol=0)


def test_extreme_outputs_stay_finite() -> None:
    raw, labels = outputs(0, "ota"), batch(0)[1]
    raw = [(x.detach() * 1e4).requires_grad_() for x in raw]
    loss = total(build_loss(ANCHORS, NC, **FORMS["ota"])(raw, labels))
    loss.backward()
    assert loss.isfinite()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in raw)


def test_scaled_gains() -> None:
    weights = LossWeights.scaled(0.05, 0.7, 0.3, levels=4, nc=40, size=1280)
    assert weights.box == pytest.approx(0.05 * 3 / 4)
    assert weights.objectness == pytest.approx(0.7 * 4 * 3 / 4)
    assert weights.classes == pytest.approx(0.3 / 2 * 3 / 4)


def test_complete_iou() -> None:
    box = torch.tensor([4.0, 4, 2, 6])
    assert complete_iou(box, box) == pytest.approx(1)
    beside = torch.tensor([10.0, 4, 2, 6])  # hull 8 x 6, centres 6 apart
    assert complete_iou(box, beside) == pytest.approx(-36 / 100)


def test_wrong_inputs_are_refused() -> None:
    raw, labels = batch(0)
    loss = build_loss(ANCHORS, NC, auxiliary=True)
    with pytest.raises(ValueError, match="expected 4 outputs of 10 channels"):
        loss(raw, labels)
    with pytest.raises(ValueError, match=r"expected labels \[B, M >= 1, 5\], got \(2, 0, 5\)"):
        loss(raw * 2, labels[:, :0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_a_cuda_graph_captures_loss_and_gradients(form: str) -> None:
    """Replayed on other predictions and labels, in fixed buffers, it gives what eager gives."""
    loss = build_loss(ANCHORS, NC, capacity=400, **FORMS[form])
    raw = [x.detach().cuda().requires_grad_() for x in outputs(0, form)]
    labels = batch(0)[1].cuda()

    def step() -> torch.Tensor:
        value = total(loss(raw, labels))
        torch.autograd.backward(value)
        return value

    def clear() -> None:
        for x in raw:
            x.grad = None

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
            clear()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    gradients = [x.grad for x in raw]
    with torch.no_grad():
        for x, y in zip(raw, outputs(5, form), strict=True):
            x.copy_(y)
        labels.copy_(batch(5)[1])
    graph.replay()
    clear()
    torch.testing.assert_close(captured, step())
    torch.testing.assert_close(gradients, [x.grad for x in raw], rtol=1e-4, atol=1e-7)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("form", FORMS)
def test_cuda_reports_no_synchronisation(form: str) -> None:
    loss = build_loss(ANCHORS, NC, **FORMS[form])
    raw = [x.detach().cuda().requires_grad_() for x in outputs(0, form)]
    labels = batch(0)[1]  # on the host, as the loader gives them
    torch.autograd.backward(total(loss(raw, labels)))
    torch.cuda.set_sync_debug_mode("error")
    try:
        torch.autograd.backward(total(loss(raw, labels)))
    finally:
        torch.cuda.set_sync_debug_mode("default")
