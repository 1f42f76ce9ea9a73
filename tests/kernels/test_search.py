"""Which configs a launch gets, and which are tried."""

from dataclasses import replace

import pytest
import torch

from tests.kernels.test_tune import CHAIN, HEAD, SMALL, STEM, launch_of
from yolov7.engine.graph.workload import workload
from yolov7.kernels import tune
from yolov7.kernels.architectures import ARCHITECTURES
from yolov7.kernels.conv.cases import Record, layer_of, meta_call
from yolov7.kernels.conv.launcher import tiles
from yolov7.kernels.conv.search import search_space
from yolov7.kernels.runtime import recording


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("record", [CHAIN, HEAD, Record(512, 512, 3, 2, 40, 40), SMALL], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_search_space_is_small_and_fits(
    record: Record, capability: tuple[int, int], dtype: torch.dtype
) -> None:
    with recording(capability):
        configs = list(search_space([meta_call(layer_of(record, 1), dtype)]))
    assert (2 if record == SMALL else 6) <= len(configs) <= 80
    assert len({str(config) for config in configs}) == len(configs)
    tma = capability >= (9, 0) and record.stride == 1
    assert {config.tma for config in configs} == {tma}
    for config in configs:
        stage = (config.block_m + config.block_n) * config.block_k * dtype.itemsize
        assert config.num_stages * stage <= ARCHITECTURES[capability].shared_bytes
        assert config.block_k >= (32 if dtype.itemsize == 1 else 16)


@pytest.mark.parametrize("batch", [1, 32])
def test_default_splits_a_sum_only_where_each_processor_has_less_to_do(batch: int) -> None:
    """Of more tiles than half the processors some get two parts: as long, and a launch more."""
    launches = workload("yolov7", batch, "fp16")["launches"]
    with recording((9, 0)):
        chosen = [(launch, launch.chosen()) for launch in launches]
    split = [
        (launch.name, count)
        for launch, config in chosen
        if config.split_k > 1
        and (count := tiles(launch.calls, config.block_m, config.block_n)) > 132 / 2
    ]
    assert split == []
    assert any(config.split_k > 1 for _, config in chosen) == (batch == 1)


def test_default_gathers_large_tiles_where_they_fill_a_hopper() -> None:
    for batch, expected in ((1, (64, 64)), (32, (256, 128))):
        with recording((9, 0)):
            chosen = launch_of(replace(CHAIN, stride=2), batch=batch).chosen()
        assert (chosen.block_m, chosen.block_n) == expected
        assert chosen.num_warps == (8 if batch == 32 else 4)


def test_likely_configs_come_first() -> None:
    """Large tiles where there is much to do, a split sum where there is little."""
    with recording((9, 0)):
        small, large = Record(512, 512, 3, 1, 20, 20), CHAIN
        few, many = (launch_of(r, batch=n).configs()[1:5] for r, n in ((small, 1), (large, 32)))
    assert all(config.split_k > 1 for config in few)
    assert all(config.split_k == 1 for config in many)
    assert all(config.block_m * config.block_n >= 128 * 128 for config in many)


def test_few_configs_of_each_launch_are_tried() -> None:
    """YOLOv7 at both batch sizes has 311 kernels to compile: 16 cores make a few a second."""
    kernels = set()
    for batch in (1, 32):
        with recording((9, 0)) as specs:
            for launch in tune.launches_to_tune(workload("yolov7", batch, "fp16")["launches"]):
                for config in launch.configs()[: tune.CANDIDATES]:
                    launch.prepare(config)()
        kernels |= {repr(replace(spec, fn=spec.fn.__name__)) for spec in specs}
    assert len(kernels) <= 350


@pytest.mark.parametrize("record", [CHAIN, STEM], ids=["conv", "stem"])
def test_default_config_is_tried_first(record: Record) -> None:
    with recording((9, 0)):
        launch = launch_of(record, batch=32)
        configs = launch.configs()
        assert configs[0] == launch.chosen()  # nothing was tuned
    assert configs.count(configs[0]) == 1
