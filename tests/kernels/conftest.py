from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from yolov7.kernels.conv import config as conv_config
from yolov7.kernels.runtime import INTERPRET


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Interpreter and compile tests need two processes: Triton decides when it decorates."""
    if "proof" not in config.option.markexpr:
        left_out = [item for item in items if item.get_closest_marker("proof")]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
    cuda = torch.cuda.is_available()
    no_interpreter = pytest.mark.skip(reason="needs TRITON_INTERPRET=1 (or a CUDA device)")
    no_compiler = pytest.mark.skip(reason="compiles nothing under TRITON_INTERPRET=1")
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("interpreter") and not (INTERPRET or cuda):
            item.add_marker(no_interpreter)
        if item.get_closest_marker("aot") and INTERPRET:
            item.add_marker(no_compiler)
        if item.get_closest_marker("gpu") and (INTERPRET or not cuda):
            item.add_marker(no_gpu)


@pytest.fixture(scope="session")
def kernel_device() -> torch.device:
    """Where a Triton kernel runs in this process: the GPU, or the CPU in the interpreter."""
    return torch.device("cuda" if torch.cuda.is_available() and not INTERPRET else "cpu")


@pytest.fixture
def poisoned_memory() -> Iterator[None]:
    """Memory comes filled with NaN (integers: the largest), so what is not written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def own_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder of tuned configs, as if nothing had been looked up yet."""
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path))
    monkeypatch.setattr(conv_config, "PACKAGED", tmp_path / "none")
    caches = conv_config.tuned_entries, conv_config.warn_untuned
    for cache in caches:
        cache.cache_clear()
    yield tmp_path / "configs"
    for cache in caches:
        cache.cache_clear()
