"""What every suite shares: options, the device, and the comparison that it reports."""

import os
from pathlib import Path

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from bench.comparison import CEILINGS, ROWS, Comparison, identify, report
from bench.results import OURS, Report, Row, comparison_table, left_out, read_rows
from yolov7.benchmark.ceilings import Ceilings
from yolov7.errors import first_line


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--smoke", action="store_true", help="toy sizes, one turn: does it run?")
    group.addoption("--seconds", type=float, default=4.0, help="of each comparison")
    group.addoption("--rows", type=Path, help="append results to this file, go on behind it")
    group.addoption("--save", action="store_true", help="keep the results under bench/results")
    group.addoption("--turns", type=int, help="be timed over this connection (see compare)")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config.stash[CEILINGS] = Ceilings(device, small=config.getoption("--smoke"))
    if handle := config.getoption("--turns"):
        from bench.turns import Turns  # for systems that have the module resource

        config.pluginmanager.register(Turns(handle), "turns")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Measure before anything else has left threads behind."""
    if session.items and not session.config.getoption("--turns"):
        session.config.stash[CEILINGS].flops(torch.float32)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Go on behind the results that the file has; time by our clock."""
    timer = pytest.mark.benchmark(timer=config.stash[CEILINGS].clock.now)
    for item in items:
        item.add_marker(timer)
    if path := config.getoption("--rows"):
        known = {(row.suite, row.case) for row in read_rows(path)}
        items[:] = [item for item in items if identify(item) not in known]


def pytest_exception_interact(node: pytest.Item) -> None:
    """Where a benchmark took the device down, note its case and end: all that comes would fail."""
    try:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except torch.AcceleratorError as error:
        reason = first_line(error)
        report(node.config, [Row(*identify(node), OURS, missing=reason)])
        pytest.exit(reason)


def pytest_terminal_summary(config: pytest.Config) -> None:
    """The table, and with --save the file."""
    rows, ceilings = config.stash[ROWS], config.stash[CEILINGS]
    if rows:
        Console(width=120).print(comparison_table(rows), *left_out(rows), sep="\n")
    if rows and config.getoption("--save"):
        print("kept:", Report.of(ceilings.device, rows, ceilings.as_dict()).save())


@pytest.fixture(scope="session")
def smoke(request: pytest.FixtureRequest) -> bool:
    """Whether toy sizes are wanted."""
    return bool(request.config.getoption("--smoke"))


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    """CUDA where there is one."""
    return request.config.stash[CEILINGS].device


@pytest.fixture(scope="session")
def kernel_device(device: torch.device) -> torch.device:
    """Where Triton kernels run: the GPU, or the CPU in the interpreter."""
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a GPU: on a CPU the operation is its plain PyTorch reference")
    return device


@pytest.fixture
def compete(request: pytest.FixtureRequest, benchmark: BenchmarkFixture) -> Comparison:
    """See `Comparison`."""
    return Comparison(request, benchmark)
