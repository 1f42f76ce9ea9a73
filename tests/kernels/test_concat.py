from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.kernels import COMPILED
from yolov7.kernels import concat as kernel
from yolov7.kernels.aot import compile_all, passed_limits
from yolov7.kernels.concat import concat
from yolov7.kernels.layout import PitchedLayout

LAYOUT = PitchedLayout.of(2, 7, 5)


def make_part(channels: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A channel slice of a wider map."""
    images = torch.randn(LAYOUT.n, channels + 3, LAYOUT.h, LAYOUT.w)
    return LAYOUT.from_nchw(images).to(device, dtype)[:, 2 : 2 + channels]


@pytest.mark.interpreter
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str
)
@pytest.mark.parametrize("channels", [(24,), (7, 130, 1), (8,) * 8], ids=str)
def test_kernel(channels: tuple[int, ...], dtype: torch.dtype, kernel_device: torch.device) -> None:
    parts = [make_part(c, dtype, kernel_device) for c in channels]
    wide = torch.full((LAYOUT.rows, sum(channels) + 2), torch.nan, device=kernel_device).to(dtype)
    concat(parts, wide[:, 1:-1])
    assert torch.equal(wide[:, 1:-1].float(), torch.cat(parts, 1).float())
    assert wide[:, [0, -1]].isnan().all()


@pytest.mark.interpreter
def test_beside_its_source(kernel_device: torch.device) -> None:
    wide = torch.randn(LAYOUT.rows, 48, device=kernel_device)
    before = wide.clone()
    concat([wide[:, 32:]], wide[:, :16])
    assert torch.equal(wide[:, :16], before[:, 32:])
    assert torch.equal(wide[:, 16:], before[:, 16:])


def test_empty_batch() -> None:
    concat([torch.empty(0, 3), torch.empty(0, 2)], torch.empty(0, 5))


def test_operation() -> None:
    parts = [make_part(c, torch.float32, torch.device("cpu")) for c in (3, 8)]
    torch.library.opcheck(kernel._concat_op, (parts, torch.zeros(LAYOUT.rows, 11)))


def test_compiles_as_one_graph() -> None:
    def joined(a: Tensor, b: Tensor) -> Tensor:
        out = torch.empty(a.shape[0], a.shape[1] + b.shape[1])
        concat([a, b], out)
        return out

    a, b = (make_part(c, torch.float32, torch.device("cpu")) for c in (3, 8))
    compiled: Callable[..., Tensor] = torch.compile(joined, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(a, b), torch.cat([a, b], 1))


MAP = torch.zeros(6, 4)


@pytest.mark.parametrize(
    ("parts", "out", "message"),
    [
        ([], MAP, "0 parts"),
        ([MAP], torch.zeros(6, 5), r"parts \[\[6, 4\]\] are not the channels of \[6, 5\]"),
        ([torch.zeros(5, 4)], MAP, r"parts \[\[5, 4\]\]"),
        ([torch.zeros(6, 4).half()], MAP, r"part torch\.float16"),
        ([torch.zeros(4, 6).t()], MAP, "channels are not contiguous"),
        ([MAP[:, :2], MAP[:, 2:]], MAP, "overlaps"),
    ],
)
def test_wrong_input(parts: list[Tensor], out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        concat(parts, out)


@pytest.mark.aot
@pytest.mark.parametrize("target", COMPILED)
def test_compiles_within_the_limits(target: str) -> None:
    rows = list(compile_all(target, {}, only=["concat"]))
    assert {row.kernel for row in rows} == {"_concat_kernel"}
    assert not [f"{row.shape}: {limit}" for row in rows for limit in passed_limits(row)]
