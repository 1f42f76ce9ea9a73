"""Triton's launch path on a CPU: its binder, its C launcher, its descriptors, on a stub driver.

Ahead-of-time compilation shows that the kernels compile. That a launch arrives, with the grid,
shared memory, descriptors and attributes that the device takes and with that same machine code,
shows here: `stub_driver.c` plays the driver of a GPU of any architecture and refuses what a real
one refuses. Nothing runs, so no number is right or wrong.
"""

import copy
import ctypes
import shutil
import subprocess
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from tests.kernels import COMPILED
from yolov7.engine.graph.workload import workload
from yolov7.kernels import aot
from yolov7.kernels.architectures import ARCHITECTURES
from yolov7.kernels.conv import ConvLaunch
from yolov7.kernels.conv.cases import Record, layer_of, meta_call
from yolov7.kernels.conv.layer import own_memory
from yolov7.kernels.runtime import (
    CompileSpec,
    TensorDescriptor,
    recording,
)

SOURCE = Path(__file__).with_name("stub_driver.c")
CPU = torch.device("cpu")
Capability = tuple[int, int]
Play = Callable[[Capability], None]
Case = tuple[str, Callable[[], object]]


class Launched(ctypes.Structure):
    """What the stub's driver was told to launch last."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("threads", ctypes.c_uint),
        ("shared", ctypes.c_uint),
        ("overlaps", ctypes.c_uint),
        ("descriptors", ctypes.c_uint),
    )


@pytest.fixture(scope="session")  # Triton binds the first library that it loads
def stub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ctypes.CDLL]:
    """The stub, loaded under the name of the driver's library: Triton's own code finds it there."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("there is no C compiler")
    if torch.cuda.is_available():
        pytest.skip("a CUDA driver is here; what a GPU does shows on it")
    library = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    flags = ("-shared", "-fPIC", "-O1", "-Wl,-soname,libcuda.so.1", f"-I{include}")
    subprocess.run([compiler, *flags, str(SOURCE), "-o", str(library)], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_LIBCUDA_PATH", str(library.parent))
        yield ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL)


@pytest.fixture
def play(stub: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Become a GPU of a compute capability. Triton knows it as a device of its own."""
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):  # type: ignore[misc]  # Triton has no types
        def __init__(self, capability: Capability) -> None:
            self.utils, self.launcher_cls = nvidia.CudaUtils(), nvidia.CudaLauncher
            self.number = 10 * capability[0] + capability[1]

        def get_current_device(self) -> int:
            return self.number

        def get_current_stream(self, _: int) -> int:
            return 0

        def get_current_target(self) -> GPUTarget:
            return GPUTarget("cuda", self.number, 32)

    def become(capability: Capability) -> None:
        played = Driver(capability)
        stub.stub_device(played.number, ARCHITECTURES[capability].shared_bytes)
        monkeypatch.setattr(driver, "_active", played)

    return become


def materialise(value: Any) -> Any:
    """An argument whose tensors have memory of their own, aligned as it was described."""
    if isinstance(value, TensorDescriptor):
        own = copy.copy(value)
        own.base = materialise(value.base)
        return own
    if isinstance(value, Tensor):
        return own_memory(value, CPU)
    if isinstance(value, tuple):
        items = map(materialise, value)
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    return value


def launch(spec: CompileSpec) -> Any:
    """Launch what was recorded as Triton does, and return the kernel that it compiled."""
    args = {name: materialise(value) for name, value in spec.args.items()}
    return spec.fn[spec.grid](**args, **spec.config)


def record(capability: Capability, cases: Iterable[Case]) -> list[CompileSpec]:
    """What the launches of some cases would be given."""
    with recording(capability) as specs:
        for _, case in cases:
            case()
    return specs


def check(spec: CompileSpec, capability: Capability, stub: ctypes.CDLL) -> None:
    """A launch arrives as it was meant, and with the machine code of the ahead-of-time compiler."""
    kernel = launch(spec)
    told = Launched.in_dll(stub, "stub_launched")
    assert tuple(told.grid) == (*spec.grid, 1, 1)[:3]
    assert told.threads == 32 * spec.options["num_warps"]
    assert told.shared == kernel.metadata.shared
    assert told.overlaps == spec.options.get("launch_pdl", 0)
    assert told.descriptors == sum(isinstance(a, TensorDescriptor) for a in spec.args.values())
    compiled = aot.compiled_kernel(spec, capability)
    assert compiled.asm["cubin"] == kernel.asm["cubin"]


@pytest.mark.aot
@pytest.mark.parametrize("target", COMPILED)
def test_launches_of_every_option_arrive(target: str, stub: ctypes.CDLL, play: Play) -> None:
    """What `test_every_option_compiles_within_the_limits` compiles, for each architecture."""
    capability = aot.capability_of(target)
    play(capability)
    specs = record(capability, aot.kernel_cases({"batch": 1}, ["conv"]))
    assert len(specs) >= 12
    for spec in specs:
        check(spec, capability, stub)


@pytest.mark.aot
def test_launches_of_a_network_arrive(stub: ctypes.CDLL, play: Play) -> None:
    """All that YOLOv7 launches for one image, from the frame to the boxes."""
    play((9, 0))
    specs = record((9, 0), aot.kernel_cases(workload("yolov7", 1, "fp16")))
    assert len({spec.fn.__name__ for spec in specs}) >= 10
    for spec in specs:
        check(spec, (9, 0), stub)


@pytest.mark.proof
@pytest.mark.parametrize("target", aot.TARGETS)
@pytest.mark.parametrize(
    ("variant", "batch", "precision"),
    [
        *((variant, batch, "fp16") for variant in ("yolov7", "yolov7-w6") for batch in (1, 32)),
        ("yolov7-tiny", 1, "fp16"),
        ("yolov7", 1, "fp8"),
        ("yolov7", 1, "fp32"),
    ],
)
def test_every_launch_arrives(
    variant: str, batch: int, precision: str, target: str, stub: ctypes.CDLL, play: Play
) -> None:
    capability = aot.capability_of(target)
    if precision == "fp8" and capability < (8, 9):
        pytest.skip(f"{target} has no fp8")
    play(capability)
    for spec in record(capability, aot.kernel_cases(workload(variant, batch, precision))):
        check(spec, capability, stub)


CHAIN = layer_of(Record(128, 128, 3, 1, 80, 80), 32)
LARGE: Case = ("", lambda: ConvLaunch([meta_call(CHAIN, torch.float16)]).prepare()())


@pytest.mark.aot
def test_planted_misfits_are_refused(play: Play) -> None:
    """A launch that was made for an H100 does not pass for one of an RTX 5090 or an A100."""
    play((12, 0))
    (spec,) = record((9, 0), [LARGE])
    with pytest.raises(triton.runtime.errors.OutOfResources, match="shared memory"):
        launch(spec)
    play((8, 0))
    (spec,) = record((8, 0), [LARGE])
    with pytest.raises(RuntimeError, match="programmatic launch on compute capability 80"):
        launch(replace(spec, config={**spec.config, "launch_pdl": 1}))


@pytest.mark.aot
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"strides": [136, 1]}, None),
        ({"strides": [132, 1]}, "stride 264 of axis 1"),
        ({"strides": [64, 1]}, "stride 128 of axis 1"),
        ({"shape": [0, 128]}, "size 0 of axis 1"),
    ],
    ids=["right", "alignment", "overlap", "empty"],
)
def test_planted_descriptor_is_refused(
    change: dict[str, Any], fault: str | None, play: Play
) -> None:
    play((9, 0))
    (spec,) = record((9, 0), [LARGE])
    descriptor = spec.args["x_desc_0"]
    for name, value in change.items():  # behind its own checks, as a fault of Triton's would be
        setattr(descriptor, name, value)
    if fault is None:
        launch(spec)
    else:
        with pytest.raises(RuntimeError, match=fault):
            launch(spec)
