"""What the kernels import: nothing above them, no Triton where there is none, no torch._dynamo."""

import ast
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from yolov7 import kernels

FOLDER = Path(str(kernels.__file__)).parent
ROOT = FOLDER.resolve().parent
FILES = sorted(FOLDER.rglob("*.py"))
ABOVE = "yolov7", "train", "bench", "tests"


def imported(path: Path) -> Iterator[str]:
    """Every module that a file may import, whether at its head, in a function or by name."""
    for node in ast.walk(ast.parse(path.read_text())):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=module, names=names):
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name), args=[first, *_]):
                if name in ("import_module", "__import__", "find_spec"):
                    yield ast.unparse(first)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.relative_to(FOLDER).as_posix())
def test_kernels_import_nothing_above_them(path: Path) -> None:
    for name in imported(path):
        below = name.startswith(("yolov7.kernels", "f'{kernels.__name__}."))
        assert below or name.split(".")[0].strip("'\"f") not in ABOVE, name


def test_only_the_runtime_imports_triton_at_its_head() -> None:
    """So that there is one place that knows what to do without it."""
    for path in FILES:
        names = {
            alias.name if isinstance(node, ast.Import) else str(node.module)
            for node in ast.parse(path.read_text()).body
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in node.names
        }
        assert not any(name.split(".")[0] == "triton" for name in names), path


WITHOUT = """
    import sys

    class Without:
        def find_spec(self, name, path=None, target=None):
            if name.split(".")[0] == "triton":
                raise ImportError(name)

    sys.meta_path.insert(0, Without())
"""
IMPORTS = """
    import pkgutil
    from importlib import import_module
    from yolov7 import kernels
    for module in pkgutil.walk_packages(kernels.__path__, "yolov7.kernels."):
        import_module(module.name)
"""
EVERYTHING = """
    import torch
    from yolov7.kernels import runtime
    from yolov7.kernels.layout import PitchedLayout
    assert not runtime.HAS_TRITON

    at, half = PitchedLayout.of(1, 4, 6), PitchedLayout.of(1, 2, 3)
    x = at.from_nchw(torch.randn(1, 16, 4, 6))

    from yolov7.kernels.conv import *
    for options in ({"kernel": 3}, {"pool": True}):
        target = half if "pool" in options else at
        layer = ConvLayer(at, target, 16, 8, **options)
        weight = torch.randn(8, layer.length)
        out = target.empty(8, dtype=x.dtype, device="cpu")
        call = ConvCall(layer, x, weight, torch.zeros(8), out)
        ConvLaunch([call]).prepare()()
        assert torch.equal(call.out, call.reference())
    images = torch.rand(1, 3, 4, 6)
    out = at.empty(8, dtype=x.dtype, device="cpu")
    StemLaunch(StemCall(Stem(at), images, torch.randn(8, 27), torch.zeros(8), out)).prepare()()
    assert out.isfinite().all()

    from yolov7.kernels.pool import max_pool, spp, upsample
    outs = [torch.empty_like(x) for _ in range(3)]
    spp(x, at, outs)
    small = half.empty(16, dtype=x.dtype, device="cpu")
    max_pool(x, at, small, half)
    upsample(small, half, x, at)

    from yolov7.kernels.concat import concat
    concat([x, x], at.empty(32, dtype=x.dtype, device="cpu"))

    from yolov7.kernels.letterbox import frame_rows, letterbox
    frame = torch.randint(256, (2 * 3 * 3,), dtype=torch.uint8)
    letterbox(frame, frame_rows([[0, 2, 3, 1, 0, 2, 6]]), images)

    from yolov7.kernels.decode import decode
    rows, counts = decode(
        [x], [torch.randn(14, 16)], [torch.zeros(14)], torch.ones(1, 2, 2), [at], [8], conf=0.1
    )
    from yolov7.kernels.nms import batched_nms
    assert batched_nms(rows, segment_counts=counts).counts.shape == (1,)

    from yolov7.kernels.reparam import reparam
    norm = torch.ones(4, 8, dtype=torch.float64)
    reparam(torch.randn(8, 8, 3, 3), norm, torch.randn(8, 8, 1, 1), norm, norm)

    from yolov7.kernels.bn_silu import batch_norm_act
    y = torch.randn(2, 4, 3, 3, requires_grad=True)
    vectors = [torch.ones(4) for _ in range(4)]
    batch_norm_act(y, *vectors, training=True).sum().backward()
    assert y.grad is not None
"""
NO_KERNEL = """
    import warnings
    import torch
    from yolov7.kernels.runtime import runs_kernels
    assert not runs_kernels(torch.device("cpu"))
    with warnings.catch_warnings(record=True) as caught:
        for _ in range(3):
            assert not runs_kernels(torch.device("cuda"))
    (warning,) = caught
    assert str(warning.message).endswith("pip install triton")
"""
NO_DYNAMO = """
    import sys
    assert "torch._dynamo" not in sys.modules
"""


def run(*parts: str) -> None:
    """Run a program in a process of its own."""
    program = "\n".join(map(textwrap.dedent, parts))
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_without_triton_every_operation_runs_its_reference() -> None:
    run(WITHOUT, IMPORTS, EVERYTHING)


def test_without_triton_a_gpu_runs_references_and_is_said_once() -> None:
    run(WITHOUT, NO_KERNEL)


def test_operations_do_not_import_dynamo() -> None:
    """Two seconds of a process that only wants to detect."""
    run(IMPORTS, EVERYTHING.replace("assert not runtime.HAS_TRITON", ""), NO_DYNAMO)
