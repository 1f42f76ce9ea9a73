"""Turns by the clock, and the ceilings that times are held against."""

import time

import pytest
import torch

from yolov7.benchmark.ceilings import Ceilings
from yolov7.benchmark.clock import Clock, Pace, Work, race

CPU = Clock(torch.device("cpu"))


def test_contenders_take_turns() -> None:
    order: list[str] = []
    runs = {"ours": lambda: order.append("ours"), "eager": lambda: order.append("eager")}
    times = race(runs, CPU, Pace(10.0, 5, most=5))
    assert order == ["ours", "eager"] * 6  # the first turn of each is not counted
    assert [len(seconds) for seconds in times.values()] == [5, 5]


def test_long_turns_are_fewer() -> None:
    assert len(race({"ours": lambda: time.sleep(0.02)}, CPU, Pace(0.01, 5))["ours"]) == 3
    assert len(race({"ours": lambda: None}, CPU, Pace(10.0, 5, most=7))["ours"]) == 7


def test_waiting_is_timed() -> None:
    assert CPU(lambda: time.sleep(0.05)) >= 0.05
    assert CPU.whole(lambda: time.sleep(0.05)) >= 0.05


def test_share_of_the_ceilings() -> None:
    ceilings = Ceilings(torch.device("cpu"), small=True)
    flops, bandwidth = ceilings.flops(torch.float32), ceilings.bandwidth
    assert 0 < ceilings.share(Work(flops=flops), 2.0) <= 0.5  # the rate is measured again
    assert ceilings.flops(torch.float32) >= flops
    assert ceilings.share(Work(bytes=3 * bandwidth), 4.0) == pytest.approx(0.75)
    assert ceilings.share(Work(), 1.0) == 0
    assert ceilings.share(Work(flops=flops, dtype=torch.float8_e4m3fn), 1.0) == 0
    assert set(ceilings.as_dict()) == {"copy GB/s", "float32 TFLOP/s"}
