"""The pitched feature map: images as one matrix of pixels, with zeros between them.

A feature map of ``n`` images, ``h x w`` pixels and ``c`` channels is a matrix ``[rows, c]``,
channels contiguous. Pixel ``(image, y, x)`` is the row ``(image * row_pitch + y) * pitch + x``
with ``pitch >= w + 1`` and ``row_pitch >= h + 1``: after every line of pixels comes at least one
zero pixel, after every image at least one line of zeros. Two images of 2 x 4 pixels, pitch 5, row
pitch 3, each pixel with the number of its row; those in brackets are border, and zero:

     0   1   2   3  [4]     the 3 x 3 pixels around row 6 are the rows 0, 1, 2, 5, 6, 7, 10, 11, 12:
     5   6   7   8  [9]     in each line as many rows apart, wherever the middle is. Right of row 8
   [10  11  12  13  14]     lies 9, which is zero, and below it 13; left of row 5 lies 4, the zero
    15  16  17  18 [19]     at the end of the line before. So a tap never needs to know where an
    20  21  22  23 [24]     image begins or ends.
   [25  26  27  28  29]

So a 3x3 convolution of stride 1 is nine
shifted matrix products: tap ``(r, s)`` of output row ``m`` reads the row
``m + (r - 1) * pitch + (s - 1)``, and what lies left of, right of, above or below an image is
zero (rows before the first and after the last are zero-filled by whoever loads them). 1x1
convolutions are plain matrix products over the rows.

Invariant: the border pixels of every map are zero. An operation that writes a map writes all its
rows, zeros in the border, so a buffer may be reused for a map of another shape uncleared.

A channel slice is ``matrix[:, a:b]``: the same rows, a narrower descriptor. The border costs 2.5 %
of the rows at 80x80, 5 % at 40x40, 10 % at 20x20.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PitchedLayout:
    """Where the pixels of a feature map lie; the channels are the tensor's affair."""

    n: int
    """Images."""
    h: int
    """Pixels of an image, vertically."""
    w: int
    """Pixels of an image, horizontally."""
    pitch: int
    """Rows of the matrix from one line of pixels to the next."""
    row_pitch: int
    """Lines from one image to the next."""

    def __post_init__(self) -> None:
        if self.n < 0 or min(self.h, self.w) < 1:
            raise ValueError(f"no feature map of {self.n} images of {self.h} x {self.w} pixels")
        if self.pitch <= self.w or self.row_pitch <= self.h:
            raise ValueError(
                f"pitches {self.row_pitch} x {self.pitch} leave no border around "
                f"{self.h} x {self.w} pixels"
            )

    @classmethod
    def of(cls, n: int, h: int, w: int) -> "PitchedLayout":
        """The narrowest layout of ``n`` images of ``h x w`` pixels.

        Args:
            n: images.
            h: height, pixels.
            w: width, pixels.
        """
        return cls(n, h, w, w + 1, h + 1)

    @property
    def rows(self) -> int:
        """Rows of the matrix, border included."""
        return self.n * self.row_pitch * self.pitch

    @property
    def sizes(self) -> list[int]:
        """The five sizes in order, for operations, whose arguments are plain."""
        return [self.n, self.h, self.w, self.pitch, self.row_pitch]

    def empty(self, channels: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """An uninitialised map ``[rows, channels]``, border included, for an operation to write."""
        return torch.empty(self.rows, channels, dtype=dtype, device=device)

    def zeros(self, channels: int, *, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """A map of zeros ``[rows, channels]``, which keeps the invariant."""
        return torch.zeros(self.rows, channels, dtype=dtype, device=device)

    def image_view(self, matrix: Tensor) -> Tensor:
        """The pixels of ``matrix [rows, c]`` without the border, a view ``[n, h, w, c]``."""
        self.check(matrix)
        lines = matrix.view(self.n, self.row_pitch, self.pitch, matrix.shape[1])
        return lines[:, : self.h, : self.w]

    def from_nchw(self, images: Tensor) -> Tensor:
        """Copy ``images [n, c, h, w]`` into a new map ``[rows, c]`` with a zero border."""
        if images.ndim != 4 or (images.shape[0], *images.shape[2:]) != (self.n, self.h, self.w):
            raise ValueError(
                f"images {tuple(images.shape)} do not fit {self.n} x [c] x {self.h} x {self.w}"
            )
        matrix = self.zeros(images.shape[1], dtype=images.dtype, device=images.device)
        self.image_view(matrix).copy_(images.permute(0, 2, 3, 1))
        return matrix

    def to_nchw(self, matrix: Tensor) -> Tensor:
        """The pixels of ``matrix [rows, c]`` as a new contiguous tensor ``[n, c, h, w]``."""
        return self.image_view(matrix).permute(0, 3, 1, 2).contiguous()

    def border(self, device: torch.device | str = "cpu") -> Tensor:
        """Which rows are border: boolean ``[rows]``."""
        mask = torch.ones(self.rows, dtype=torch.bool, device=device)
        mask.view(self.n, self.row_pitch, self.pitch)[:, : self.h, : self.w] = False
        return mask

    def check(self, matrix: Tensor, name: str = "map") -> None:
        """Raise ``ValueError`` unless ``matrix`` is ``[rows, c]`` with contiguous channels."""
        if matrix.ndim != 2 or matrix.shape[0] != self.rows:
            raise ValueError(
                f"{name} {tuple(matrix.shape)} is not [{self.rows}, channels], the pitched map of "
                f"{self.n} x {self.h} x {self.w} pixels, pitches {self.row_pitch} x {self.pitch}"
            )
        if matrix.shape[1] > 1 and matrix.stride(1) != 1:
            raise ValueError(f"{name} with strides {matrix.stride()} has no contiguous channels")
