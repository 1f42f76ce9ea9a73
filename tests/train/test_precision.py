from dataclasses import replace

import pytest
import torch

from yolov7.train import precision
from yolov7.train.loop import train
from yolov7.train.options import Train
from yolov7.train.precision import slow_precision, training_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16)]
)
def test_auto_is_what_the_device_computes_in(
    capability: tuple[int, int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert training_dtype("auto", CUDA) == dtype
    assert training_dtype("auto", CPU) == torch.float32
    assert training_dtype("bf16", CPU) == torch.bfloat16


def test_bf16_without_its_instructions_is_one_warning(
    options: Train, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(precision, "_X86", True)
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False)
    warning = slow_precision(torch.bfloat16, CPU)
    assert warning.startswith("warning: this processor has no bf16 instructions")
    assert slow_precision(torch.float32, CPU) == slow_precision(torch.bfloat16, CUDA) == ""
    train(replace(options, epochs=1, precision="bf16"))
    assert capsys.readouterr().out.count(warning) == 1
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: True)
    assert slow_precision(torch.bfloat16, CPU) == ""
