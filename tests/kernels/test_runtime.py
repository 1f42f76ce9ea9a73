import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import Mock

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from yolov7.kernels import runtime


@triton.jit
def _copy_kernel(x_ptr, out_ptr, x_desc, count, scale, one, BLOCK: tl.constexpr):
    pass


def _record(count: int, x: Tensor) -> runtime.CompileSpec:
    with runtime.recording((9, 0)) as specs:
        args = {
            "x_ptr": x,
            "out_ptr": x[1:],
            "x_desc": TensorDescriptor.from_tensor(x.view(-1, 64), [16, 64]),
            "count": count,
            "scale": 0.5,
            "one": 1,
        }
        runtime.launch(_copy_kernel, (4,), args, {"BLOCK": 64, "num_warps": 2})
    return specs[0]


@pytest.mark.skipif(runtime.INTERPRET, reason="nothing compiles in the interpreter")
def test_recording_specialises_as_a_launch_would() -> None:
    spec = _record(48, torch.empty(4096, dtype=torch.float16, device="meta"))
    assert spec.signature == {
        "x_ptr": "*fp16",
        "out_ptr": "*fp16",
        "x_desc": "tensordesc<fp16[16, 64]>",
        "count": "i32",
        "scale": "fp32",
        "one": "constexpr",
        "BLOCK": "constexpr",
    }
    assert spec.constexprs == {(5,): 1, (6,): 64}
    aligned = [["tt.divisibility", 16]]
    assert spec.attrs == {(0,): aligned, (1,): [], (3,): aligned, (5,): [], (6,): []}
    assert spec.options == {"num_warps": 2}
    assert _record(49, torch.empty(4096, device="meta")).attrs[(3,)] == []
    assert _record(2**31, torch.empty(4096, device="meta")).signature["count"] == "i64"


@pytest.mark.skipif(runtime.INTERPRET, reason="nothing compiles in the interpreter")
def test_recording_names_wrong_arguments() -> None:
    with runtime.recording((9, 0)), pytest.raises(ValueError, match=r"no arguments \['width'\]"):
        runtime.launch(_copy_kernel, (1,), {"width": 1}, {})
    with runtime.recording((9, 0)), pytest.raises(ValueError, match="lacks its argument x_ptr"):
        runtime.launch(_copy_kernel, (1,), {}, {})


def test_empty_grid_launches_nothing() -> None:
    runtime.launch(None, (0, 3), {}, {})


def test_every_operation_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton launches on the current device, and PyTorch sets none for custom operations."""
    current: list[torch.device] = [torch.device("cuda", 0)]

    @contextmanager
    def entered(device: torch.device) -> Iterator[None]:
        current.append(device)
        yield
        current.pop()

    def body(options: list[int], maps: list[Tensor], extra: Tensor | None) -> torch.device:
        return current[-1]

    library = Mock()
    monkeypatch.setattr(runtime, "_library", library)
    monkeypatch.setattr(torch.library, "infer_schema", lambda *_, **__: "() -> ()")
    monkeypatch.setattr(torch.library, "register_fake", Mock())
    monkeypatch.setattr(torch.cuda, "device", entered)
    with pytest.raises(AttributeError):  # nothing was defined
        runtime.triton_op("device_test", body, body, body)
    bodies = {call.args[2]: call.args[1] for call in library.impl.call_args_list}
    on_cuda = bodies["CUDA"]
    assert inspect.signature(on_cuda) == inspect.signature(body)
    x = torch.empty(2, device="meta")
    assert on_cuda([3], [x], None) == x.device
    assert on_cuda([3], [], extra=x) == x.device
    assert current == [torch.device("cuda", 0)]


def test_one_name_has_three_bodies() -> None:
    def triton_body(x: Tensor) -> Tensor:
        return x + 1

    def reference(x: Tensor) -> Tensor:
        return x - 1

    op = runtime.triton_op("runtime_test", triton_body, reference, torch.empty_like)
    x = torch.zeros(3)
    assert torch.equal(op(x), x + 1 if runtime.INTERPRET else x - 1)
    assert torch.ops.yolov7.runtime_test(x.to("meta")).device.type == "meta"
    torch.library.opcheck(op, (x,))
