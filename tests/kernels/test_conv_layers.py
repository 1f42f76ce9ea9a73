"""Every convolution of the published models, every type and shipped config, on the GPU."""

import pytest
import torch

from yolov7.kernels import runtime
from yolov7.kernels.aot import workload
from yolov7.kernels.conv import ConvCall, choose_config, conv_reference, workspace_elements
from yolov7.kernels.conv.cases import DTYPES
from yolov7.kernels.conv.launcher import config_kind, default_config, fits_tma
from yolov7.kernels.runtime import Config
from yolov7.kernels.tune import check_config, layers_to_tune, load_entries, random_call


def configs_of(call: ConvCall) -> list[Config]:
    """The default config, the chosen one, and every other that is shipped for this kind."""
    folder = runtime.device_folder(call.x.device)
    assert folder is not None
    kind = config_kind([call])
    shipped = load_entries(runtime.CONFIGS / folder / "conv.json").values()
    same = [
        e.config for e in shipped if e.kind == kind and (fits_tma([call]) or not e.config["TMA"])
    ]
    configs = [default_config([call]), choose_config([call]), *same]
    return list({str(config): config for config in configs}.values())


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["yolov7", "yolov7-w6", "yolov7-e6e"])
@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("precision", DTYPES)
def test_every_layer_of_a_model(variant: str, batch: int, precision: str) -> None:
    dtype, device = DTYPES[precision], torch.device("cuda")
    if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no fp8")
    records = workload(variant, 1, precision)["layers"]
    wrong = []
    for layer in layers_to_tune(records, [batch], dtype):
        call = random_call(layer, dtype, device)
        expected = conv_reference(call)
        for config in configs_of(call):
            workspace = torch.empty(workspace_elements([call], config), device=device)
            fault = check_config(call, expected, config, workspace)
            if fault is not None:
                wrong.append(f"{layer.describe()} {config}: {fault}")
        assert (call.out[layer.target.border(device)].float() == 0).all()
    assert wrong == []
