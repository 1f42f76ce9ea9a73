"""What every kernel file shares: Triton itself, registering an operation, launching.

An operation has one name and three bodies: on CUDA the Triton kernel, elsewhere the plain PyTorch
reference, on a CPU under ``TRITON_INTERPRET=1`` the Triton kernel in the interpreter
(`triton_op`). Its launcher gets an explicit config, allocates nothing, and starts its kernel
through `launch`. That is also how a kernel is compiled for a GPU that is not there: inside
`recording`, `launch` notes what it would compile instead of running it, so a launcher called with
tensors of ``device="meta"`` yields exactly the specialisation that the GPU would be given. Each
kernel file offers ``compile_cases`` for `yolov7.kernels.aot`; see `CompileSpec`.

Triton has no wheels for every machine. Kernel files take `triton` and `tl` from here: where Triton
is missing these are stand-ins under which a kernel can be defined and never run, and the references
are what there is.
"""

import functools
import inspect
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.torch_version import TorchVersion

from yolov7.kernels.architectures import ARCHITECTURES, UNKNOWN

__all__ = [
    "AMD",
    "DTYPE_NAMES",
    "FLOATS",
    "H200",
    "HAS_TRITON",
    "INTERPRET",
    "PRECISIONS",
    "CompileSpec",
    "Config",
    "Rates",
    "TensorDescriptor",
    "begin",
    "capability",
    "device_folder",
    "early",
    "is_recording",
    "launch",
    "processors",
    "recording",
    "rounding",
    "runs_kernels",
    "shared_bytes",
    "tl",
    "triton",
    "triton_op",
    "unfit",
]


class _Missing:
    """Stands for `triton` and whatever is taken from it; as a decorator it changes nothing."""

    def __getattr__(self, _: str) -> "_Missing":
        return self

    def __call__(self, argument: Any) -> Any:
        return argument


try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:
    HAS_TRITON = False
    triton = tl = _Missing()

    class TensorDescriptor:  # type: ignore[no-redef]  # of which there are none then
        """Stands for Triton's."""
else:
    HAS_TRITON = True

AMD = torch.version.hip is not None
"""Whether this PyTorch is for AMD's GPUs, where kernels do without NVIDIA's instructions."""

INTERPRET = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether this process runs kernels in Triton's interpreter (read when kernels are decorated)."""

PRECISIONS = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "int8": torch.int8,
    "fp32": torch.float32,
}
"""Types of feature maps and weights, by the names that options, configs and tables give them."""
FLOATS = {name: dtype for name, dtype in PRECISIONS.items() if dtype.itemsize > 1}
"""Those that PyTorch computes in."""
DTYPE_NAMES = {dtype: name for name, dtype in PRECISIONS.items()}


def rounding(factor: Tensor, *, exact: bool) -> str:
    """``input_precision`` of a product: TF32's of fp32 unless it has to be exact."""
    return "tf32" if factor.dtype == torch.float32 and not exact else "ieee"


@dataclass(frozen=True)
class Rates:
    """What a GPU was measured to reach."""

    name: str
    flops: float
    """Operations of dense matrix products in fp16, per second."""
    bandwidth: float
    """Bytes that copies read and write, per second."""

    def seconds(self, flops: float, moved: float) -> float:
        """The roofline of some operations and bytes: whichever takes longer at full rate."""
        return max(flops / self.flops, moved / self.bandwidth)


H200 = Rates("NVIDIA H200", 790e12, 4.3e12)
"""What the expectations in docstrings, and the order of the tuner's work, are made of."""


Config = Mapping[str, int]
"""Constexprs of a kernel (``BLOCK_M`` ...) and compile options (``num_warps`` ...), by name."""

COMPILE_OPTIONS = ("num_warps", "num_stages", "maxnreg", "launch_pdl", "enable_fp_fusion")

# Not `torch.library.custom_op`: its wrapper imports torch._dynamo at the first call, two seconds.
_library = torch.library.Library("yolov7", "FRAGMENT")


def triton_op(
    name: str,
    triton_body: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    mutates_args: Sequence[str] = (),
) -> OpOverload:
    """Register ``torch.ops.yolov7.NAME`` with its bodies and return it.

    Args:
        name: the operation's name.
        triton_body: allocates, chooses the config and launches; its annotations are the schema.
        reference: the same result in plain PyTorch, for other devices, and without Triton.
        fake: allocates the outputs only (``torch.compile``, export).
        mutates_args: names of the tensors that the operation writes.
    """
    schema = torch.library.infer_schema(triton_body, mutates_args=tuple(mutates_args))
    _library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(name, _on_cuda(triton_body, reference), "CUDA")
    _library.impl(name, triton_body if INTERPRET else reference, "CompositeExplicitAutograd")
    torch.library.register_fake(f"yolov7::{name}", fake, lib=_library)
    op: OpOverload = getattr(torch.ops.yolov7, name).default
    return op


def runs_kernels(device: torch.device) -> bool:
    """Whether kernels run on a device, or are recorded for it; else their references do.

    A GPU without Triton is said once.
    """
    if device.type == "cuda" and not HAS_TRITON:
        _warn_of_references()
    return INTERPRET or (HAS_TRITON and device.type in ("cuda", "meta"))


def unfit(capability: tuple[int, int]) -> str | None:
    """Why this Triton's machine code is not to be trusted on a GPU, or None.

    Before 3.7.1 it lets the matrix instructions of Blackwell's data-centre GPUs overtake cp.async
    (triton pull requests 9610 and 10537), and results differ from run to run there (pytorch issue
    181248). Hopper lacks the same fence, and the same case came out right there.

    Args:
        capability: the GPU's compute capability.
    """
    if not (HAS_TRITON and capability[0] in (10, 11)):
        return None
    if TorchVersion(triton.__version__) >= "3.7.1":  # a release candidate is older
        return None
    major, minor = capability
    return (
        f"Triton {triton.__version__} computes wrongly on compute capability {major}.{minor}: "
        "install PyTorch 2.12 or later, which brings Triton 3.7.1"
    )


@functools.cache
def _warn_of_references() -> None:
    text = "there is no Triton: plain PyTorch stands in for the kernels, slowly; pip install triton"
    warnings.warn(text, stacklevel=2)


def _on_cuda(triton_body: Callable[..., Any], reference: Callable[..., Any]) -> Callable[..., Any]:
    """What runs on CUDA, with the first tensor's device made the current one.

    Triton launches on the current device, and PyTorch sets none for operations: on another GPU
    than the current one a kernel would run where its pointers mean nothing.
    """

    @functools.wraps(triton_body)
    def body(*args: Any, **kwargs: Any) -> Any:
        device = next(_tensors((*args, *kwargs.values()))).device
        if not runs_kernels(device):
            return reference(*args, **kwargs)
        with torch.cuda.device(device):
            return triton_body(*args, **kwargs)

    return body


def _tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list):
            yield from _tensors(argument)


@dataclass(frozen=True)
class CompileSpec:
    """One specialisation of a kernel, as `triton.compile` takes it.

    A kernel file tells the ahead-of-time compiler what to compile by a function
    ``compile_cases(...) -> Iterator[tuple[str, Callable[[], None]]]``: pairs of a readable shape
    ("64x80x80 -> 128, 3x3") and a call of its launcher with tensors on ``device="meta"``.
    """

    fn: Any
    """The ``@triton.jit`` function."""
    signature: dict[str, Any]
    """Argument -> type: ``*fp16``, ``i32``, ``tensordesc<fp16[128, 64]>``, ``constexpr``."""
    constexprs: dict[tuple[int, ...], Any]
    """Path of the argument -> value, integers that are 1 included."""
    attrs: dict[tuple[int, ...], list[list[Any]]]
    """Path of the argument -> ``[["tt.divisibility", 16]]`` where that holds."""
    options: dict[str, Any]
    """num_warps, num_stages, ..."""
    config: dict[str, Any] = field(default_factory=dict)
    """What the launcher was given, for the table."""
    grid: tuple[int, ...] = field(default=(), repr=False)
    """Programs along each axis."""
    args: dict[str, Any] = field(default_factory=dict, repr=False)
    """What else the kernel would be called with; tensors are on ``device="meta"``."""


@dataclass
class _Recorder:
    capability: tuple[int, int]
    device: str | None
    specs: list[CompileSpec]


_recorder: _Recorder | None = None


@contextmanager
def recording(
    capability: tuple[int, int], device: str | None = None
) -> Iterator[list[CompileSpec]]:
    """Note what `launch` would compile for a GPU instead of running it.

    Args:
        capability: the GPU's compute capability, (9, 0) for instance.
        device: folder of configs whose tuned ones are used; None for the defaults.
    """
    global _recorder
    previous, _recorder = _recorder, _Recorder(capability, device, [])
    try:
        yield _recorder.specs
    finally:
        _recorder = previous


def is_recording() -> bool:
    """Whether this is inside `recording`."""
    return _recorder is not None


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of ``device``, (0, 0) of one of AMD's.

    The interpreter plays the oldest of NVIDIA's that is supported, (8, 0).
    """
    if _recorder is not None:
        return _recorder.capability
    if AMD and device.type == "cuda":
        return 0, 0
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (8, 0)


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of ``device``; of a typical GPU of its capability if absent."""
    if _recorder is None and device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return ARCHITECTURES.get(capability(device), UNKNOWN).processors


def shared_bytes(device: torch.device) -> int:
    """Shared memory that one program may use on ``device``; the compiler does not check it."""
    return ARCHITECTURES.get(capability(device), UNKNOWN).shared_bytes


def device_folder(device: torch.device) -> str | None:
    """Name of the folder of tuned configs for ``device``, None without a GPU."""
    if _recorder is not None:
        return _recorder.device
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_name(device).replace(" ", "_")


@triton.jit
def begin(PDL: tl.constexpr):
    """Wait for the kernel before, and let the one after be launched, under programmatic launch.

    Its programs then stand ready when this kernel's last one ends: inside a CUDA graph at batch 1
    the gap between kernels is as long as a layer.
    """
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


def early(device: torch.device) -> Config:
    """What has a kernel that calls `begin` launched before the one before has ended, if it can be.

    GPUs before sm_90 do not know the option.
    """
    return {"PDL": 1, "launch_pdl": 1} if capability(device) >= (9, 0) else {"PDL": 0}


def launch(kernel: Any, grid: tuple[int, ...], args: Mapping[str, Any], config: Config) -> None:
    """Run ``kernel[grid](**args, **config)``, or note it inside `recording`.

    Args:
        kernel: a ``@triton.jit`` function.
        grid: programs along each axis; nothing is launched when one is 0.
        args: tensors, tensor descriptors, numbers and constexprs by name.
        config: constexprs and compile options.
    """
    if AMD:  # whose compiler knows no such option
        config = {name: value for name, value in config.items() if name != "maxnreg"}
    if _recorder is not None:
        _recorder.specs.append(replace(_specialise(kernel, args, config), grid=grid, args={**args}))
    elif math.prod(grid) > 0:
        kernel[grid](**args, **config)


_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.bool: "i1",
}


def _specialise(kernel: Any, args: Mapping[str, Any], config: Config) -> CompileSpec:
    """The specialisation that Triton's launcher would compile for these arguments.

    It is the launcher's to the letter, so that both find the same entry of Triton's cache.
    """
    options = {k: v for k, v in config.items() if k in COMPILE_OPTIONS}
    values = {**args, **{k: v for k, v in config.items() if k not in COMPILE_OPTIONS}}
    unknown = values.keys() - set(kernel.arg_names)
    if unknown:
        raise ValueError(f"{kernel.__name__} has no arguments {sorted(unknown)}")
    signature: dict[str, Any] = {}
    constexprs: dict[tuple[int, ...], Any] = {}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}

    def note(value: Any, path: tuple[int, ...], constexpr: bool) -> Any:
        if isinstance(value, tuple) and not constexpr:
            items = (note(item, (*path, i), constexpr) for i, item in enumerate(value))
            return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
        kind, aligned = _argument_type(value)
        if constexpr or kind == "constexpr":
            constexprs[path] = value
            kind, aligned = "constexpr", False if len(path) == 1 else None
        if aligned is not None:
            attrs[path] = [["tt.divisibility", 16]] if aligned else []
        return kind

    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        value = values.get(name, parameter.default)
        if value is inspect.Parameter.empty:
            raise ValueError(f"{kernel.__name__} lacks its argument {name}")
        signature[name] = note(value, (index,), parameter.is_constexpr)
    return CompileSpec(kernel, signature, constexprs, attrs, options, dict(config))


def _argument_type(value: Any) -> tuple[str, bool | None]:
    """(Triton type, whether it is known to be divisible by 16) of a launch argument.

    What Triton does not ask for divisibility has None.
    """
    if isinstance(value, TensorDescriptor):
        return f"tensordesc<{_TYPES[value.base.dtype]}{list(value.block_shape)}>", None
    if isinstance(value, Tensor):
        # A tensor on "meta" counts its address from 0; a slice of it is as aligned as on a GPU.
        meta = value.device.type == "meta"
        address = int(value.storage_offset()) * value.element_size() if meta else value.data_ptr()
        return f"*{_TYPES[value.dtype]}", address % 16 == 0
    if isinstance(value, bool):
        return "i1", False
    if isinstance(value, int) and value != 1:
        return ("i32" if -(2**31) <= value < 2**31 else "i64"), value % 16 == 0
    if isinstance(value, float):
        return "fp32", None
    return "constexpr", None
