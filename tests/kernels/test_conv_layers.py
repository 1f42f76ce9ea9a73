"""Every launch of the published models, every type and shipped config, on the GPU."""

import pytest
import torch

from yolov7.kernels.aot import workload
from yolov7.kernels.conv.cases import DTYPES, call_name
from yolov7.kernels.tune import (
    check_config,
    launches_to_tune,
    members,
    random_calls,
    references,
    shipped_configs,
)


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["yolov7", "yolov7-w6", "yolov7-e6e"])
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("precision", DTYPES)
def test_every_launch_of_a_model(variant: str, batch: int, precision: str) -> None:
    device = torch.device("cuda")
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    wrong = []
    for launch in launches_to_tune(workload(variant, batch, precision)["calls"]):
        calls = random_calls(launch, device)
        expected = references(calls)
        for config in shipped_configs(calls).values():
            fault = check_config(calls, expected, config)
            if fault is not None:
                wrong.append(f"{call_name(calls)} {config}: {fault}")
        for call in members(calls):
            assert (call.out[call.layer.target.border(device)].float() == 0).all()
    assert wrong == []
