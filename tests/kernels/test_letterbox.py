from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

from tests.conftest import reference_folder
from tests.kernels import COMPILED
from yolov7.kernels import letterbox as kernel
from yolov7.kernels.aot import compile_all, compiled_kernel, instructions, passed_limits
from yolov7.kernels.letterbox import frame_rows, letterbox, letterbox_reference
from yolov7.kernels.runtime import FLOATS, recording

CASES = sorted((reference_folder() / "letterbox").glob("*.npz"))
SIZE = (40, 50)
# (height, width) of the frame; top, left, height, width of its box: up, down, one side only, as it
# is, single pixels, exactly half.
FRAMES = [
    ((17, 23), (3, 0, 37, 50)),
    ((61, 47), (0, 9, 40, 31)),
    ((33, 20), (4, 15, 33, 21)),
    ((12, 50), (14, 0, 12, 50)),
    ((1, 7), (18, 0, 7, 50)),
    ((80, 1), (0, 24, 40, 1)),
    ((64, 98), (4, 0, 32, 49)),
]


def make_frames() -> list[Tensor]:
    random = torch.Generator().manual_seed(0)
    return [
        torch.randint(256, (*shape, 3), generator=random, dtype=torch.uint8) for shape, _ in FRAMES
    ]


def packed(frames: list[Tensor], device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
    """The frames behind one another, and the table for their boxes."""
    ends = np.cumsum([0, *(frame.numel() for frame in frames)])
    boxes = [box for _, box in FRAMES[: len(frames)]]
    rows = [
        [end, *frame.shape[:2], *box] for end, frame, box in zip(ends, frames, boxes, strict=False)
    ]
    pixels = torch.cat([frame.flatten() for frame in frames])
    return pixels.to(device), frame_rows(rows).to(device)


def expected(frames: list[Tensor]) -> Tensor:
    """[B, 3, H, W] fp32 by OpenCV."""
    images = np.full((len(frames), *SIZE, 3), 114, dtype=np.uint8)
    for image, frame, (_, (top, left, height, width)) in zip(images, frames, FRAMES, strict=True):
        resized = cv2.resize(frame.numpy(), (width, height), interpolation=cv2.INTER_LINEAR)
        image[top : top + height, left : left + width] = resized
    return torch.from_numpy(images[..., ::-1].copy()).permute(0, 3, 1, 2).float() / 255


def test_reference_equals_opencv() -> None:
    frames = make_frames()
    pixels, table = packed(frames)
    out = torch.empty(len(frames), 3, *SIZE)
    letterbox_reference(pixels, table, out)
    assert torch.equal(out, expected(frames))


@pytest.fixture
def large_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, for the interpreter."""
    monkeypatch.setattr(kernel, "CONFIG", {"BLOCK_Y": 64, "BLOCK_X": 32, "num_warps": 4})


@pytest.mark.interpreter
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.usefixtures("large_blocks")
def test_kernel_equals_opencv(dtype: torch.dtype, kernel_device: torch.device) -> None:
    frames = make_frames()
    pixels, table = packed(frames, kernel_device)
    images = expected(frames).to(dtype)
    out = torch.full((len(frames), 3, *SIZE), torch.nan, dtype=dtype, device=kernel_device)
    found = letterbox(pixels, table, out).cpu()
    if dtype == torch.bfloat16:  # which the interpreter truncates
        torch.testing.assert_close(found, images, rtol=2**-7, atol=0)
    else:
        assert torch.equal(found, images)


@pytest.mark.interpreter
@pytest.mark.usefixtures("large_blocks")
def test_kernel_writes_any_strides(kernel_device: torch.device) -> None:
    frames = make_frames()
    pixels, table = packed(frames, kernel_device)
    wide = torch.full((len(frames), *SIZE, 5), torch.nan, device=kernel_device)
    letterbox(pixels, table, wide[..., 1:4].permute(0, 3, 1, 2))
    assert torch.equal(wide[..., 1:4].permute(0, 3, 1, 2).cpu(), expected(frames))
    assert wide[..., [0, 4]].isnan().all()


@pytest.mark.interpreter
@pytest.mark.usefixtures("large_blocks")
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_kernel_equals_stored_images(path: Path, kernel_device: torch.device) -> None:
    with np.load(path) as case:
        frame, image = torch.from_numpy(case["input"]), torch.from_numpy(case["output"])
        left, top = (round(pad - 0.1) for pad in case["pad"].tolist())
        height, width = (
            round(side * ratio)
            for side, ratio in zip(frame.shape[:2], case["ratio"][::-1].tolist(), strict=True)
        )
    size = (image.shape[0], image.shape[1])
    table = frame_rows([[0, *frame.shape[:2], top, left, height, width]]).to(kernel_device)
    out = torch.full((1, 3, *size), torch.nan, device=kernel_device)
    letterbox(frame.flatten().to(kernel_device), table, out)
    assert torch.equal((out[0] * 255).round().cpu(), image.permute(2, 0, 1).flip(0).float())


@pytest.mark.interpreter
def test_kernel_stays_inside_the_frames(kernel_device: torch.device) -> None:
    pixels = torch.full((12,), 200, dtype=torch.uint8, device=kernel_device)
    table = frame_rows([[0, 100, 100, 0, 0, 4, 4]]).to(kernel_device)  # there is no such
    out = torch.full((1, 3, 4, 4), torch.nan, device=kernel_device)
    assert letterbox(pixels, table, out).isfinite().all()


def test_empty_batch() -> None:
    assert letterbox(BYTES, TABLE[:0], torch.empty(0, 3, *SIZE)).shape == (0, 3, *SIZE)


def test_operation() -> None:
    frames = make_frames()[:2]
    pixels, table = packed(frames)
    out = torch.zeros(2, 3, *SIZE)
    torch.library.opcheck(kernel._letterbox_op, (pixels, table, out))


def test_compiles_as_one_graph() -> None:
    frames = make_frames()
    pixels, table = packed(frames)
    compiled = torch.compile(letterbox, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(pixels, table, torch.empty(7, 3, *SIZE)), expected(frames))


BYTES, TABLE = torch.zeros(12, dtype=torch.uint8), torch.zeros(2, 9, dtype=torch.int64)


@pytest.mark.parametrize(
    ("pixels", "table", "out", "message"),
    [
        (BYTES.float(), TABLE, torch.zeros(2, 3, 4, 4), r"uint8 \[n\], got torch\.float32 \[12\]"),
        (BYTES, TABLE[:, :6], torch.zeros(2, 3, 4, 4), r"got torch\.int64 \[2, 6\]"),
        (BYTES, TABLE, torch.zeros(3, 3, 4, 4), r"\[3, 3, 4, 4\], not \[2, 3, H, W\]"),
        (BYTES, TABLE, torch.zeros(2, 3, 4, 4).int(), r"out is torch\.int32"),
    ],
)
def test_wrong_input(pixels: Tensor, table: Tensor, out: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        letterbox(pixels, table, out)


def test_wrong_device() -> None:
    with pytest.raises(ValueError, match="devices differ: cpu, meta, cpu"):
        letterbox(BYTES, TABLE.to("meta"), torch.zeros(2, 3, 4, 4))


@pytest.mark.aot
@pytest.mark.parametrize("target", COMPILED)
def test_compiles_within_the_limits(target: str) -> None:
    rows = list(compile_all(target, {}, only=["letterbox"]))
    assert {row.kernel for row in rows} == {"_letterbox_kernel"}
    assert not [f"{row.shape}: {limit}" for row in rows for limit in passed_limits(row)]


@pytest.mark.aot
def test_axes_take_few_operations_of_fp64() -> None:
    """Twelve a thread, the axes' arithmetic being there three times: a division takes ten alone."""
    for _, case in kernel.compile_cases():
        with recording((8, 9)) as specs:
            case()
        names = Counter(instructions(compiled_kernel(specs[0], (8, 9)).asm["cubin"]))
        assert 0 < sum(names[name] for name in ("DADD", "DMUL", "DFMA", "F2F", "I2F")) <= 12


@pytest.mark.interpreter
@pytest.mark.usefixtures("large_blocks")
def test_places_are_opencv_s_in_large_frames(kernel_device: torch.device) -> None:
    """Where fp32 leaves few bits of a place's fraction."""
    frame = torch.arange(9001 * 3, dtype=torch.int64).mul(7919).remainder(256).byte()
    frame = frame.view(1, 9001, 3)
    table = frame_rows([[0, 1, 9001, 0, 0, 1, 1277]]).to(kernel_device)
    out = torch.full((1, 3, 1, 1277), torch.nan, device=kernel_device)
    letterbox(frame.flatten().to(kernel_device), table, out)
    resized = cv2.resize(frame.numpy(), (1277, 1), interpolation=cv2.INTER_LINEAR)
    assert torch.equal(out[0, :, 0].flip(0).cpu().T * 255, torch.from_numpy(resized[0]).float())
