"""What the suites hold against what, and where."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bench import bench_engine, bench_train
from bench.comparison import Contenders
from yolov7.benchmark.clock import Run
from yolov7.model import create_model
from yolov7.variants import VARIANTS

META = torch.device("meta")


class Devices(TorchDispatchMode):
    """Notes on which devices operations run, all or those of a name."""

    def __init__(self, name: str = "") -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch has no annotation
        self.name = name
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and self.name in str(func):
            self.seen.add(result.device.type)
        return result


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_eager_network_can_be_captured(variant: str) -> None:
    """The host waits for no number of the device (meta would have none) and hands it none over."""
    with META:
        model = create_model(variant).fuse()
        images = torch.rand(2, 3, 128, 128)
    with Devices() as devices:
        model(images)
    assert devices.seen == {"meta"}


def test_network_and_rival_are_captured_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the rival's time at batch 1 would be that of its launches."""
    graphs: list[Run] = []

    def captured(run: Run, device: torch.device) -> Run:
        graphs.append(run)
        return run

    def compete(contenders: Contenders, **_: object) -> None:
        assert list(contenders.values()) == graphs

    monkeypatch.setattr(bench_engine, "captured", captured)
    model, planned = bench_engine.prepared("yolov7", 1, torch.device("cpu"), True)
    bench_engine.compare_networks(compete, planned, "eager", model)  # type: ignore[arg-type]  # a stand-in
    assert len(graphs) == 2


def test_loss_gets_its_outputs_on_the_device() -> None:
    """They are a whole network's, which would take a CPU longer than all turns take."""
    devices = Devices("aten.convolution")

    def compete(contenders: Contenders, **_: object) -> None:
        pass

    with devices:
        bench_train.bench_loss("yolov7", 64, 2, compete, META, smoke=True)  # type: ignore[arg-type]  # a stand-in
    assert devices.seen == {"meta"}
