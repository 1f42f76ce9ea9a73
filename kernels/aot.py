"""Compile every kernel for a GPU that is not there, and say what the compiler made of it.

`compile_all` compiles what a model launches, with the default and every shipped config, and gives
one row for each kernel: registers, shared and local memory, matrix instructions and where their
first operand comes from, loads through tensor descriptors, instructions. `passed_limits` names what
must not be: local memory (spilled registers), more shared memory than the device has (the compiler
does not check that), a convolution without matrix instructions, a descriptor convolution whose
operands are not both in shared memory on Hopper, matrix instructions that may overtake cp.async.

Kernel files take part by a function ``compile_cases`` (see `CompileSpec`); its parameters are
filled by name from what the caller knows of the model. The numbers are exact and the same on every
machine, so comparing them with a stored table (`worse`) is a regression check that needs no GPU.
"""

import inspect
import json
import pkgutil
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

from yolov7 import kernels
from yolov7.kernels.architectures import ARCHITECTURES
from yolov7.kernels.conv import config
from yolov7.kernels.runtime import CompileSpec, recording, triton, unfit

TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
"""Architectures that the kernels are made for."""
REGISTER_LIMIT = 255
TOLERANCE = 0.05
"""How much worse than the stored table a number may be."""
COMPARED = ("registers", "shared_bytes", "local_bytes", "instructions")
_MATRIX = ("HMMA", "HGMMA", "QGMMA", "QMMA", "UTCHMMA", "UTCQMMA", "IMMA", "IGMMA")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)([^;]*);")


@dataclass(frozen=True)
class Row:
    """What one kernel became."""

    kernel: str
    shape: str
    target: str
    config: str
    registers: int
    shared_bytes: int
    local_bytes: int
    mma: str
    """Kind of matrix instruction, empty without any."""
    mma_count: int
    mma_operand: str
    """Where the first operand comes from: shared, registers, or empty."""
    tma_loads: int
    unfenced: int
    """Matrix instructions that may read shared memory before what cp.async wrote there."""
    instructions: int

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the row in another table of the same target."""
        return self.kernel, self.shape, self.config


def capability_of(target: str) -> tuple[int, int]:
    """(9, 0) for ``sm_90``.

    Raises:
        ValueError: none of the targets.
    """
    if target not in TARGETS:
        raise ValueError(f"target {target!r} is none of {', '.join(TARGETS)}")
    number = int(target.removeprefix("sm_"))
    return number // 10, number % 10


def compiled_kernel(spec: CompileSpec, capability: tuple[int, int]) -> Any:
    """What Triton makes of one specialisation; the same launch finds it in Triton's cache."""
    major, minor = capability
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(spec.fn, spec.signature, spec.constexprs, spec.attrs)
    options = {"enable_fp_fusion": True, **spec.options}
    return triton.compile(source, target=GPUTarget("cuda", 10 * major + minor, 32), options=options)


def compile_spec(spec: CompileSpec, target: str, shape: str = "") -> Row:
    """Compile one specialisation for a target and read the machine code."""
    compiled = compiled_kernel(spec, capability_of(target))
    text = _disassemble(compiled.asm["cubin"])
    usage = re.search(r"REG:(\d+) STACK:(\d+).*? LOCAL:(\d+)", text)
    if usage is None:
        raise RuntimeError(f"cuobjdump says nothing about {spec.fn.__name__}")
    found = [(name.split(".")[0], operands) for name, operands in _INSTRUCTION.findall(text)]
    counts = Counter(name for name, _ in found)
    mma = next((kind for kind in _MATRIX if counts[kind]), "")
    return Row(
        kernel=spec.fn.__name__,
        shape=shape,
        target=target,
        config=" ".join(f"{k}={v}" for k, v in spec.config.items()),
        registers=int(usage[1]),
        shared_bytes=compiled.metadata.shared,
        local_bytes=int(usage[2]) + int(usage[3]),
        mma=mma,
        mma_count=counts[mma] if mma else 0,
        mma_operand=_operand([text for name, text in found if name == mma]),
        tma_loads=counts["UTMALDG"],
        unfenced=unfenced(compiled.asm["ptx"]),
        instructions=sum(counts.values()),
    )


def instructions(cubin: bytes) -> list[str]:
    """The names of machine code's instructions, without their options, in order."""
    found = _INSTRUCTION.findall(_disassemble(cubin))
    return [name.split(".")[0] for name, _ in found]


def _operand(operands: Sequence[str]) -> str:
    """Where warp-group matrix instructions find A: HGMMA D, A, B or HGMMA D, descriptor."""
    firsts = [text.split(",")[1].strip() for text in operands if "gdesc" in text]
    if not firsts:
        return ""
    return "shared" if all(first.startswith("gdesc") for first in firsts) else "registers"


def unfenced(ptx: str) -> int:
    """Matrix instructions that read, by another way, what cp.async wrote, without a fence between.

    Those of sm_90 and sm_100 (wgmma, tcgen05) read shared memory by the asynchronous proxy; what
    the threads wrote, cp.async included, is seen there for certain behind ``fence.proxy.async``.
    Triton 3.6 leaves it out; see `yolov7.kernels.runtime.unfit`.
    """
    found, waits = 0, False
    for token in _PROXIES.findall(ptx):
        if token.startswith("cp"):
            waits = True
        elif token.startswith("fence"):
            waits = False
        else:
            found += waits
    return found


_PROXIES = re.compile(r"cp\.async\.wait_\w+|fence\.proxy\.async|wgmma\.mma_async|tcgen05\.mma")


def _disassemble(cubin: bytes) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        parts = [
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True)
            for flag in ("-sass", "-res-usage")
        ]
    return "\n".join(part.stdout for part in parts)


def passed_limits(row: Row) -> list[str]:
    """The limits that a row passes, in words."""
    limit = ARCHITECTURES[capability_of(row.target)].shared_bytes
    found = []
    if row.local_bytes:
        found.append(f"{row.local_bytes} bytes of local memory")
    if row.shared_bytes > limit:
        found.append(f"{row.shared_bytes} bytes of shared memory, {row.target} has {limit}")
    if row.registers > REGISTER_LIMIT:
        found.append(f"{row.registers} registers")
    if row.kernel in _CONVOLUTIONS and not row.mma and " exact" not in row.shape:
        found.append("no matrix instructions")
    if row.kernel == "conv_tma_kernel" and row.target == "sm_90" and row.mma_operand != "shared":
        found.append("the first operand passes through registers")
    if row.kernel == "conv_tma_kernel" and not row.tma_loads:
        found.append("no loads through tensor descriptors")
    if row.unfenced and not (row.target == "sm_90" and unfit((10, 0))):
        found.append(f"{row.unfenced} matrix instructions without a fence behind cp.async")
    return found


_CONVOLUTIONS = ("conv_tma_kernel", "conv_gather_kernel", "conv_stem_kernel")


def worse(rows: Sequence[Row], baseline: Sequence[Row]) -> list[str]:
    """What became worse than the stored table: numbers by more than 5 %, lost matrix instructions.

    Rows that the stored table alone has are named too: a kernel or config that went away leaves
    it stale. New rows have nothing to be compared with.
    """
    before = {row.key: row for row in baseline}
    after = {row.key: row for row in rows}
    found = [f"{' | '.join(key)}: only in the table" for key in before.keys() - after.keys()]
    for key in after.keys() & before.keys():
        old, new = before[key], after[key]
        for field in COMPARED:
            was, now = getattr(old, field), getattr(new, field)
            if now > was * (1 + TOLERANCE):
                found.append(f"{' | '.join(key)}: {field} {was} -> {now}")
        was, now = (f"{r.mma} {r.mma_operand}, {r.tma_loads} TMA loads" for r in (old, new))
        lost_loads = old.tma_loads > 0 and new.tma_loads == 0
        if (old.mma, old.mma_operand) != (new.mma, new.mma_operand) or lost_loads:
            found.append(f"{' | '.join(key)}: {was} -> {now}")
    return sorted(found)


Cases = Iterator[tuple[str, Callable[[], object]]]


def kernel_files() -> dict[str, Callable[..., Cases]]:
    """The kernel files of this package, and what makes the cases of each."""
    names = [info.name for info in pkgutil.iter_modules(kernels.__path__)]
    modules = {name: import_module(f"{kernels.__name__}.{name}") for name in names}
    return {
        name: module.compile_cases
        for name, module in modules.items()
        if hasattr(module, "compile_cases")
    }


def kernel_cases(known: Mapping[str, Any], only: Sequence[str] = ()) -> Cases:
    """The cases of every kernel file of this package, (shape, launch on meta tensors)."""
    for file, cases in kernel_files().items():
        if only and file not in only:
            continue
        wanted = inspect.signature(cases).parameters
        yield from cases(**{name: known[name] for name in wanted if name in known})


def compile_all(
    target: str, known: Mapping[str, Any], *, only: Sequence[str] = ()
) -> Iterator[Row]:
    """Compile every case for a target, with the default and with every shipped config."""
    capability = capability_of(target)
    done: dict[str, Row] = {}
    seen: set[tuple[str, str, str]] = set()
    for device in (None, *shipped_devices(capability)):
        for shape, case in kernel_cases(known, only):
            with recording(capability, device) as specs:
                case()
            for spec in specs:
                # Most shapes differ only in numbers that the machine code does not contain.
                identity = repr(replace(spec, fn=spec.fn.__name__))
                if identity not in done:
                    done[identity] = compile_spec(spec, target)
                row = replace(done[identity], shape=shape)
                if row.key not in seen:
                    seen.add(row.key)
                    yield row


def shipped_devices(capability: tuple[int, int]) -> list[str]:
    """Folders of packaged configs that were tuned on a device of this capability."""
    return sorted(
        {
            path.parent.name
            for path in config.PACKAGED.glob("*/conv.json")
            if json.loads(path.read_text())["capability"] == list(capability)
        }
    )


def table(rows: Sequence[Row]) -> dict[str, Any]:
    """The JSON form: the compiler's version, the rows, and how many pass a limit."""
    return {
        "triton": triton.__version__,
        "rows": [asdict(row) for row in rows],
        "totals": {"rows": len(rows), "over_limit": sum(bool(passed_limits(r)) for r in rows)},
    }


def load_table(path: Path) -> tuple[str, list[Row]]:
    """(Triton's version, rows) of a stored table."""
    data = json.loads(path.read_text())
    return data["triton"], [Row(**row) for row in data["rows"]]
