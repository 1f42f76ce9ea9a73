import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from yolov7.boxes import frame_table, in_frames
from yolov7.letterbox import GREY, letterbox, letterbox_geometry

sides = st.integers(1, 4000)


@given(height=sides, width=sides, multiple=st.integers(1, 20), stride=st.sampled_from([32, 64]))
def test_fills_the_size_exactly(height: int, width: int, multiple: int, stride: int) -> None:
    size = multiple * stride
    geometry = letterbox_geometry((height, width), size)
    assert geometry.shape == (size, size)
    assert max(geometry.size) == size
    assert min(geometry.border) >= 0


@given(height=sides, width=sides, multiple=st.integers(1, 20), stride=st.sampled_from([32, 64]))
def test_auto_gives_the_smallest_multiple_of_the_stride(
    height: int, width: int, multiple: int, stride: int
) -> None:
    geometry = letterbox_geometry((height, width), multiple * stride, stride=stride, auto=True)
    for side, content in zip(geometry.shape, geometry.size, strict=True):
        assert side % stride == 0
        assert content <= side < content + stride


@given(height=st.integers(1, 100), width=st.integers(1, 100))
def test_without_scaleup_a_small_image_keeps_its_size(height: int, width: int) -> None:
    geometry = letterbox_geometry((height, width), (128, 160), scaleup=False)
    assert geometry.size == (height, width)
    assert geometry.shape == (128, 160)


@given(height=sides, width=sides, auto=st.booleans())
def test_boxes_come_back(height: int, width: int, auto: bool) -> None:
    geometry = letterbox_geometry((height, width), 640, auto=auto)
    whole = torch.tensor([[[0.0, 0.0, width, height]]], dtype=torch.float64)
    boxed = whole * geometry.ratio[0] + torch.tensor([*geometry.pad, *geometry.pad]).double()
    back = in_frames(boxed, frame_table([geometry]))
    torch.testing.assert_close(back, whole, rtol=0, atol=1e-6 * max(height, width))


@pytest.mark.parametrize("shape", [(1, 1), (1, 3000), (3000, 1)])
def test_pixels_of_extreme_shapes(shape: tuple[int, int]) -> None:
    image = letterbox(np.full((*shape, 3), 7, np.uint8), letterbox_geometry(shape, 64))
    assert image.shape == (64, 64, 3)
    assert set(np.unique(image)) <= {7, GREY}
    assert (image == 7).any()


def test_an_image_of_the_right_size_passes_unchanged() -> None:
    image = np.arange(32 * 64 * 3, dtype=np.uint8).reshape(32, 64, 3)
    geometry = letterbox_geometry((32, 64), 64, auto=True)
    np.testing.assert_array_equal(letterbox(image, geometry), image)
    assert (geometry.ratio, geometry.pad) == ((1.0, 1.0), (0.0, 0.0))


@given(height=sides, width=sides)
def test_a_frame_that_was_scaled_before_is_seen_through_both_scalings(
    height: int, width: int
) -> None:
    scaled = (max(height // 3, 1), max(width // 2, 1))
    geometry = letterbox_geometry(scaled, 640).seen_from((height, width))
    assert geometry.frame == (height, width)
    corner = torch.tensor([[[0.0, 0.0, *geometry.size[::-1]]]]) + torch.tensor(geometry.pad * 2)
    back = in_frames(corner.double(), frame_table([geometry]))
    atol = 1.5 * max(height / geometry.size[0], width / geometry.size[1])  # a rounded side
    torch.testing.assert_close(
        back, torch.tensor([[[0.0, 0.0, width, height]]]).double(), rtol=0, atol=atol
    )
