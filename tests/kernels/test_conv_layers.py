"""Every launch of the published models, every type and shipped config, on the GPU."""

import pytest
import torch

from yolov7.engine.graph.workload import workload
from yolov7.kernels.runtime import PRECISIONS
from yolov7.kernels.tune import check_config, launches_to_tune, shipped_configs


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["yolov7", "yolov7-w6", "yolov7-e6e"])
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_launch_of_a_model(variant: str, batch: int, precision: str) -> None:
    device = torch.device("cuda")
    if precision == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    wrong = []
    for described in launches_to_tune(workload(variant, batch, precision)["launches"]):
        launch = described.random(device)
        expected = launch.reference()
        for config in shipped_configs(launch).values():
            fault = check_config(launch, expected, config)
            if fault is not None:
                wrong.append(f"{launch.name} {config}: {fault}")
        for call in launch.calls:
            assert (call.out[call.layer.target.border(device)].float() == 0).all()
    assert wrong == []
