"""The first convolution, from images of three channels to a pitched map.

Three channels are too few for a row of a matrix product, so here the whole sum (27 terms, 108 in
the P6 variants) is one short axis whose elements are gathered one by one from wherever the image
lies: any strides, so a plain NCHW batch and the pixels of a pitched map serve alike.

The P6 variants rearrange 2x2 pixels into 12 channels and convolve those 3x3. That is a 6x6
convolution of stride 2 over the image itself (`space_to_depth_weight`), so the rearranged image is
never written.

Expected time on an H200: bound by memory. 640x640 -> 32 channels in fp16 reads 2.5 MB and writes
26.3 MB: 6.7 us per image at 4.3 TB/s; 1280x1280 -> 64 at stride 2 reads 9.8 and writes 52.6 MB:
14.5 us. The gather issues 11 million (44 million) 2-byte loads, most of them from L1, and what it
takes to find them bounds it at batch 1: 31 instructions of a warp for each row of 32 channels, 135
for one of 64 at stride 2, are 14 and 62 us of the issue slots of 132 processors at 1.7 GHz.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from yolov7.kernels.conv.config import ConvConfig
from yolov7.kernels.conv.layer import (
    ACTIVATIONS,
    Activation,
    activate,
    epilogue_activation,
    exact_conv2d,
    own_memory,
)
from yolov7.kernels.conv.parts import Geometry, Scales, finish, multiply, store_rows
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.runtime import DTYPE_NAMES, FLOATS, begin, launch, rounding, tl, triton


@dataclass(frozen=True)
class Stem:
    """The first convolution: 3x3 with a padding of 1, or 6x6 with 2, over images.

    Raises:
        ValueError: kernel, stride or activation is not one that the kernel computes.
    """

    target: PitchedLayout
    """Where the output's pixels lie."""
    kernel: int = 3
    stride: int = 1
    activation: Activation = "silu"
    """silu, leaky_relu (slope 0.1) or none."""
    exact: bool = False
    """Multiply fp32 exactly instead of as TF32."""
    out_scale: float = 1.0
    """What one unit of an output of 8 bits stands for; 1 for other types."""

    def __post_init__(self) -> None:
        if (self.kernel, self.stride) not in ((3, 1), (3, 2), (6, 2)):
            raise ValueError(f"no stem of {self.kernel}x{self.kernel}, stride {self.stride}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {ACTIVATIONS}")

    @property
    def compute(self) -> PitchedLayout:
        """The layout whose rows are computed."""
        return self.target


@dataclass(frozen=True)
class StemCall:
    """A first convolution with its tensors, all preallocated: what the launcher takes."""

    layer: Stem
    images: Tensor
    """``[n, c, h, w]``, any strides."""
    weight: Tensor
    """``[out, kernel * kernel * c]``."""
    bias: Tensor
    """``[out]`` fp32."""
    out: Tensor
    """``[target.rows, out]``, a channel slice or whole."""

    @property
    def exact(self) -> bool:
        """Whether products are those of fp32, which no matrix instruction computes."""
        return self.layer.exact and self.weight.dtype == torch.float32

    def describe(self) -> str:
        """One readable line: ``1x3x640x640 -> 32, 3x3 s1 stem``."""
        k, shape = self.layer.kernel, "x".join(map(str, self.images.shape))
        return f"{shape} -> {self.out.shape[1]}, {k}x{k} s{self.layer.stride} stem"

    def check(self) -> None:
        """Raise ``ValueError`` unless the tensors fit the layer and each other."""
        k, t, stride = self.layer.kernel, self.layer.target, self.layer.stride
        images, weight, bias, out = self.images, self.weight, self.bias, self.out
        t.check(out, "output")
        size = [(side + 2 * ((k - 1) // 2) - k) // stride + 1 for side in images.shape[2:]]
        if images.ndim != 4 or [images.shape[0], *size] != [t.n, t.h, t.w]:
            raise ValueError(
                f"images {tuple(images.shape)} do not give {t.n} x {t.h} x {t.w} pixels by a "
                f"{k}x{k} convolution of stride {stride}"
            )
        for name, tensor in (("images", images), ("weight", weight), ("bias", bias)):
            if tensor.device != out.device:
                raise ValueError(f"{name} is on {tensor.device}, the output on {out.device}")
        n_out = out.shape[1]
        if tuple(weight.shape) != (n_out, k * k * images.shape[1]) or not weight.is_contiguous():
            raise ValueError(
                f"weight {tuple(weight.shape)} is not a contiguous "
                f"({n_out}, {k * k * images.shape[1]})"
            )
        if tuple(bias.shape) != (n_out,) or bias.dtype != torch.float32:
            raise ValueError(f"bias {bias.dtype} {tuple(bias.shape)} is not fp32 ({n_out},)")
        if weight.dtype not in FLOATS.values() or out.dtype not in DTYPE_NAMES:
            raise ValueError(f"weight {weight.dtype}, output {out.dtype}: no such stem")

    def reference(self) -> Tensor:
        """The output map ``[target.rows, out]`` in fp32, in plain PyTorch, zero border."""
        stem, k, channels = self.layer, self.layer.kernel, self.images.shape[1]
        weight = self.weight.float().view(-1, k, k, channels).permute(0, 3, 1, 2)
        y = exact_conv2d(self.images.float(), weight, stem.stride, (k - 1) // 2)
        return stem.target.from_nchw(activate(y + self.bias[:, None, None], stem.activation))

    def random(self, device: torch.device) -> "StemCall":
        """The call with memory of its own and random content, outputs O(1)."""
        return replace(
            self,
            images=own_memory(self.images, device).uniform_(),
            weight=own_memory(self.weight, device).normal_(std=self.weight.shape[1] ** -0.5),
            bias=own_memory(self.bias, device).normal_(),
            out=own_memory(self.out, device),
        )


def space_to_depth_weight(weight: Tensor) -> Tensor:
    """The 6x6 weight that does to an image what a 3x3 one does to its 2x2 rearrangement.

    Args:
        weight: ``[out, 4 c, 3, 3]``; its input channels are ``c`` channels of the pixels
            (even line, even column), (odd, even), (even, odd), (odd, odd).

    Returns:
        ``[out, c, 6, 6]``, for a stride and a padding of 2.
    """
    out, channels = weight.shape[0], weight.shape[1] // 4
    parts = weight.view(out, 2, 2, channels, 3, 3)  # [out, column, line, c, 3, 3]
    return parts.permute(0, 3, 4, 2, 5, 1).reshape(out, channels, 6, 6)


@triton.jit
def _divide(x, DIVISOR: tl.constexpr):
    """``x // DIVISOR`` of numbers below 1000: two instructions, where ``//`` becomes ten."""
    return (x * (65536 // DIVISOR + 1)) >> 16


@triton.jit
def conv_stem_kernel(
    # Tensors
    image_ptr,  # [N, CHANNELS, image_h, image_w], any strides
    weight_ptr,  # [n_out, KERNEL * KERNEL * CHANNELS]
    bias_ptr,  # [n_out] fp32
    out_ptr,  # [rows, n_out]
    # Shapes
    image_h,
    image_w,
    images,
    shape,  # Geometry
    # Strides
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    # Scalars
    scales,  # Scales
    # Constexprs
    CHANNELS: tl.constexpr,
    KERNEL: tl.constexpr,
    STRIDE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
    PDL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One block of rows and channels of the output map."""
    begin(PDL)
    length: tl.constexpr = KERNEL * KERNEL * CHANNELS
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)

    # Of each row: the image's pixel under the first tap. What a border row sums is discarded.
    line = offs_m // shape.pitch
    top = line % shape.row_pitch * STRIDE - (KERNEL - 1) // 2
    left = offs_m % shape.pitch * STRIDE - (KERNEL - 1) // 2
    image = tl.minimum(line // shape.row_pitch, images - 1)
    image_ptrs = image_ptr + image.to(tl.int64) * stride_n + top.to(tl.int64) * stride_h
    image_ptrs += left * stride_w

    # The sum over taps and channels, one short axis; what lies outside the image is zero.
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.static_range(0, length, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        mask_k = offs_k < length
        tap = _divide(offs_k, CHANNELS)
        below = _divide(tap, KERNEL)
        right = tap - below * KERNEL
        offsets = below * stride_h + right * stride_w + (offs_k - tap * CHANNELS) * stride_c
        # Terms past the last are below the image. Without a sign, one comparison sees both ends.
        at_y = top[:, None] + tl.where(mask_k, below, image_h + KERNEL)[None, :]
        at_x = left[:, None] + right[None, :]
        held = (at_y.to(tl.uint32) < image_h) & (at_x.to(tl.uint32) < image_w)
        a = tl.load(image_ptrs[:, None] + offsets[None, :], mask=held, other=0.0)
        weight_ptrs = weight_ptr + offs_n[None, :] * length + offs_k[:, None]
        mask_b = (offs_n < shape.n_out)[None, :] & mask_k[:, None]
        b = tl.load(weight_ptrs, mask=mask_b, other=0.0)
        acc = multiply(a.to(b.dtype), b, acc, PRECISION, False)
    acc = finish(acc, None, bias_ptr, None, offs_m, offs_n, shape, scales, ACTIVATION)
    store_rows(out_ptr, acc, offs_m, offs_n, shape, scales, False)


def launch_stem(call: StemCall, config: ConvConfig) -> None:
    """Run the first convolution; nothing is checked.

    Args:
        call: sizes, options and tensors.
        config: how.
    """
    stem, images, out = call.layer, call.images, call.out
    t, n_out = stem.target, out.shape[1]
    shape = Geometry(
        t.rows,
        t.h,
        t.w,
        t.pitch,
        t.row_pitch,
        images.shape[1],
        n_out,
        source_rows=0,  # the source is no pitched map
        source_pitch=0,
        source_row_pitch=0,
        target_pitch=t.pitch,
        target_row_pitch=t.row_pitch,
        x_stride=0,
        residual_stride=0,
        out_stride=out.stride(0),
    )
    args = {
        "image_ptr": images,
        "weight_ptr": call.weight,
        "bias_ptr": call.bias,
        "out_ptr": out,
        "image_h": images.shape[2],
        "image_w": images.shape[3],
        "images": t.n,
        "shape": shape,
        "stride_n": images.stride(0),
        "stride_c": images.stride(1),
        "stride_h": images.stride(2),
        "stride_w": images.stride(3),
        "scales": Scales(1.0, float(stem.out_scale)),
        "CHANNELS": images.shape[1],
        "KERNEL": stem.kernel,
        "STRIDE": stem.stride,
        "ACTIVATION": epilogue_activation(stem.activation, out.dtype),
        "PRECISION": rounding(call.weight, exact=stem.exact),
        "PDL": config.launch_pdl,
        "BLOCK_N": config.block_n,
    }
    grid = (triton.cdiv(t.rows, config.block_m), triton.cdiv(n_out, config.block_n))
    launch(conv_stem_kernel, grid, args, config.options("BLOCK_M", "BLOCK_K"))
