import pytest
import torch

from yolov7.model import YOLOv7, create_model
from yolov7.train.autobatch import largest_batch
from yolov7.train.loss import Loss, head_loss

SIZE = 320
MEMORY = 4_000_000_000  # bytes that the search is told are free


def training_pair(device: str) -> tuple[YOLOv7, Loss]:
    model = create_model("yolov7-tiny", 2).to(device).train()
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
    return model, head_loss(model, plain=False)


def test_a_cpu_is_not_measured() -> None:
    model, loss = training_pair("cpu")
    assert largest_batch(model, loss, SIZE, torch.device("cpu"), torch.float32) == 16


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_largest_batch_fills_the_memory_and_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda")
    model, loss = training_pair("cuda")
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda _: (MEMORY, MEMORY))
        patch.setattr(torch.cuda, "memory_reserved", lambda _: 0)
        batch = largest_batch(model, loss, SIZE, device, torch.bfloat16)
    torch.cuda.reset_peak_memory_stats(device)
    images = torch.rand(batch, 3, SIZE, SIZE, device=device)
    labels = torch.tensor([0, 0.5, 0.5, 0.2, 0.2]).repeat(batch, 50, 1)
    with torch.autocast("cuda", torch.bfloat16):
        outputs = model(images.contiguous(memory_format=torch.channels_last))
    terms = loss(outputs, labels)
    torch.autograd.backward(terms["box"] + terms["objectness"] + terms["classes"])
    assert 0.6 * MEMORY < torch.cuda.max_memory_allocated(device) < MEMORY
