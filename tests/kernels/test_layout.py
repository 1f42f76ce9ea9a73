import pytest
import torch

from yolov7.kernels.layout import PitchedLayout


@pytest.mark.parametrize("extra", [0, 2], ids=["narrow", "wide"])
@pytest.mark.parametrize(
    ("n", "h", "w", "c"), [(1, 1, 1, 1), (2, 7, 10, 24), (3, 20, 13, 8), (0, 4, 4, 3)]
)
def test_round_trip_with_zero_border(n: int, h: int, w: int, c: int, extra: int) -> None:
    layout = PitchedLayout(n, h, w, w + 1 + extra, h + 1 + extra)
    images = torch.randn(n, c, h, w)
    matrix = layout.from_nchw(images)
    assert matrix.shape == (layout.rows, c)
    assert torch.equal(layout.to_nchw(matrix), images)
    border = layout.border()
    assert int(border.sum()) == layout.rows - n * h * w
    assert not matrix[border].any()


def test_pixel_row_is_the_documented_one() -> None:
    layout = PitchedLayout.of(2, 3, 5)
    images = torch.arange(2 * 3 * 5, dtype=torch.float32).view(2, 1, 3, 5) + 1
    matrix = layout.from_nchw(images)
    assert (layout.pitch, layout.row_pitch) == (6, 4)
    assert matrix[(1 * 4 + 2) * 6 + 3, 0] == images[1, 0, 2, 3]


def test_shifted_products_are_a_convolution() -> None:
    """The layout's reason: nine shifted row matrices equal a padded 3x3 convolution."""
    layout = PitchedLayout.of(2, 4, 6)
    images, weight = torch.randn(2, 5, 4, 6), torch.randn(7, 5, 3, 3)
    matrix = layout.from_nchw(images)
    margin = layout.pitch + 1
    padded = torch.nn.functional.pad(matrix, (0, 0, margin, margin))
    out = torch.zeros(layout.rows, 7)
    for r in range(3):
        for s in range(3):
            start = margin + (r - 1) * layout.pitch + (s - 1)
            out += padded[start : start + layout.rows] @ weight[:, :, r, s].T
    expected = torch.nn.functional.conv2d(images, weight, padding=1)
    torch.testing.assert_close(layout.to_nchw(out), expected)


def test_slices_are_views() -> None:
    layout = PitchedLayout.of(1, 2, 2)
    wide = layout.zeros(16, dtype=torch.float32, device="cpu")
    layout.image_view(wide[:, 8:]).fill_(1)
    assert wide[:, :8].sum() == 0
    assert wide.sum() == 2 * 2 * 8


def test_wrong_shapes_are_named() -> None:
    layout = PitchedLayout.of(2, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 3, 5, 4\)"):
        layout.from_nchw(torch.zeros(2, 3, 5, 4))
    with pytest.raises(ValueError, match=r"\(10, 3\)"):
        layout.check(torch.zeros(10, 3))
    with pytest.raises(ValueError, match="contiguous channels"):
        layout.check(torch.zeros(3, layout.rows).T)
    with pytest.raises(ValueError, match="leave no border"):
        PitchedLayout(1, 4, 4, pitch=4, row_pitch=5)
    with pytest.raises(ValueError, match="0 x 4"):
        PitchedLayout.of(1, 0, 4)
