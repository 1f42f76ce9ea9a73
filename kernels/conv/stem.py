"""The first convolution, from images of three channels to a pitched map.

Three channels are too few for a row of a matrix product, so here the whole sum (27 terms, 108 in
the P6 variants) is one short axis whose elements are gathered one by one from wherever the image
lies: any strides, so a plain NCHW batch and the pixels of a pitched map serve alike.

The P6 variants rearrange 2x2 pixels into 12 channels and convolve those 3x3. That is a 6x6
convolution of stride 2 over the image itself (`space_to_depth_weight`), so the rearranged image is
never written.

Expected time on an H200: bound by memory. 640x640 -> 32 channels in fp16 reads 2.5 MB and writes
26.3 MB: 6.7 us per image at 4.3 TB/s; 1280x1280 -> 64 at stride 2 reads 9.8 and writes 52.6 MB:
14.5 us. The gather issues 11 million (44 million) 2-byte loads, most of them from L1.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from yolov7.kernels.conv.layer import (
    ACTIVATIONS,
    DTYPE_NAMES,
    DTYPES,
    activate,
    epilogue_activation,
    exact_conv2d,
    to_dtype,
)
from yolov7.kernels.conv.parts import begin, finish, multiply, store_rows
from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.runtime import Config, capability, find_config, launch, triton_op


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
    activation: str = "silu"
    """silu, leaky_relu (slope 0.1) or none."""
    exact: bool = False
    """Multiply fp32 exactly instead of as TF32."""
    out_scale: float = 1.0
    """What one unit of an fp8 output stands for; 1 for other types."""

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
        """Raise ``ValueError`` unless the tensors fit; see `conv_stem`."""
        k, t, stride = self.layer.kernel, self.layer.target, self.layer.stride
        images, weight, bias, out = self.images, self.weight, self.bias, self.out
        t.check(out, "output")
        size = [(side + 2 * ((k - 1) // 2) - k) // stride + 1 for side in images.shape[2:]]
        if images.ndim != 4 or [images.shape[0], *size] != [t.n, t.h, t.w]:
            raise ValueError(
                f"images {tuple(images.shape)} do not give {t.n} x {t.h} x {t.w} pixels by a "
                f"{k}x{k} convolution of stride {stride}"
            )
        n_out = out.shape[1]
        if tuple(weight.shape) != (n_out, k * k * images.shape[1]) or not weight.is_contiguous():
            raise ValueError(
                f"weight {tuple(weight.shape)} is not a contiguous "
                f"({n_out}, {k * k * images.shape[1]})"
            )
        if tuple(bias.shape) != (n_out,) or bias.dtype != torch.float32:
            raise ValueError(f"bias {bias.dtype} {tuple(bias.shape)} is not fp32 ({n_out},)")
        if weight.dtype not in DTYPES or weight.dtype.itemsize == 1 or out.dtype not in DTYPES:
            raise ValueError(f"weight {weight.dtype}, output {out.dtype}: no such stem")


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


def stem_reference(call: StemCall) -> Tensor:
    """The output map ``[target.rows, out]`` in fp32, in plain PyTorch, zero border."""
    stem, k, channels = call.layer, call.layer.kernel, call.images.shape[1]
    weight = call.weight.float().view(-1, k, k, channels).permute(0, 3, 1, 2)
    y = exact_conv2d(call.images.float(), weight, stem.stride, (k - 1) // 2)
    return stem.target.from_nchw(activate(y + call.bias[:, None, None], stem.activation))


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
    shape,
    # Strides
    stride_n,
    stride_c,
    stride_h,
    stride_w,
    # Scalars
    scales,
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
    _, h, w, pitch, row_pitch = shape[0]
    n_out = shape[1][1]
    length: tl.constexpr = KERNEL * KERNEL * CHANNELS
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    line = offs_m // pitch
    x = offs_m % pitch
    y = line % row_pitch
    inside = (x < w) & (y < h)
    top = y * STRIDE - (KERNEL - 1) // 2
    left = x * STRIDE - (KERNEL - 1) // 2
    # Rows past the last image are border (y < h fails there or nothing is stored).
    image_ptrs = image_ptr + tl.minimum(line // row_pitch, shape[2][0] - 1).to(tl.int64) * stride_n
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in tl.static_range(0, length, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        tap = offs_k // CHANNELS
        at_y = top[:, None] + (tap // KERNEL)[None, :]
        at_x = left[:, None] + (tap % KERNEL)[None, :]
        mask_k = offs_k < length
        held = (at_y >= 0) & (at_y < image_h) & (at_x >= 0) & (at_x < image_w)
        offsets = at_y * stride_h + at_x * stride_w + (offs_k % CHANNELS * stride_c)[None, :]
        mask = held & inside[:, None] & mask_k[None, :]
        a = tl.load(image_ptrs[:, None] + offsets, mask=mask, other=0.0)
        weight_ptrs = weight_ptr + offs_n[None, :] * length + offs_k[:, None]
        mask_b = (offs_n < n_out)[None, :] & mask_k[:, None]
        b = tl.load(weight_ptrs, mask=mask_b, other=0.0)
        acc = multiply(a.to(b.dtype), b, acc, PRECISION, False)
    acc = finish(acc, None, bias_ptr, None, offs_m, offs_n, shape, scales, ACTIVATION)
    store_rows(out_ptr, acc, offs_m, offs_n, shape, scales, False)


def stem_kind(call: StemCall) -> str:
    """What configs of the JSON file are for: ``stem3x3s1-fp16``."""
    stem = call.layer
    precision = "exact" if call.exact else DTYPE_NAMES[call.out.dtype]
    return f"stem{stem.kernel}x{stem.kernel}s{stem.stride}-{precision}"


def stem_size(call: StemCall) -> tuple[int, int]:
    """(rows, output channels): the size that configs are looked up by."""
    return call.layer.target.rows, call.out.shape[1]


def default_stem_config(call: StemCall) -> Config:
    """A config for devices and sizes that nobody tuned."""
    config = {"BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 1}
    return config | ({"launch_pdl": 1} if capability(call.out.device) >= (9, 0) else {})


def stem_config(call: StemCall) -> Config:
    """The tuned config of the nearest stem on this device, or the default one."""
    default = default_stem_config(call)
    return find_config(stem_kind(call), stem_size(call), default, call.out.device)


def launch_stem(call: StemCall, config: Config) -> None:
    """Run the first convolution.

    Args:
        call: sizes, options and tensors; ``call.check`` is the caller's affair, once.
        config: ``BLOCK_M``, ``BLOCK_K``, ``num_warps``, ``num_stages``, ``launch_pdl``.
    """
    stem, images, out = call.layer, call.images, call.out
    t, n_out = stem.target, out.shape[1]
    block_n = max(16, triton.next_power_of_2(n_out))
    if call.exact:  # multiplied one by one: operands live in registers
        block_n = min(block_n, 32)
    args = {
        "image_ptr": images,
        "weight_ptr": call.weight,
        "bias_ptr": call.bias,
        "out_ptr": out,
        "image_h": images.shape[2],
        "image_w": images.shape[3],
        "shape": (
            (t.rows, t.h, t.w, t.pitch, t.row_pitch),
            (images.shape[1], n_out),
            (t.n, 0, 0),
            (0, 0),
            (0, 0, out.stride(0)),
        ),
        "stride_n": images.stride(0),
        "stride_c": images.stride(1),
        "stride_h": images.stride(2),
        "stride_w": images.stride(3),
        "scales": (1.0, float(stem.out_scale)),
        "CHANNELS": images.shape[1],
        "KERNEL": stem.kernel,
        "STRIDE": stem.stride,
        "ACTIVATION": epilogue_activation(stem.activation, out.dtype),
        "PRECISION": "ieee" if stem.exact else "tf32",
        "PDL": bool(config.get("launch_pdl", 0)),
        "BLOCK_N": block_n,
    }
    grid = (triton.cdiv(t.rows, config["BLOCK_M"]), triton.cdiv(n_out, block_n))
    launch(conv_stem_kernel, grid, args, config)


def _stem_triton(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    target: list[int],
    kernel: int,
    stride: int,
    activation: str,
    exact: bool,
    out_scale: float,
) -> None:
    stem = Stem(PitchedLayout(*target), kernel, stride, activation, exact, out_scale)
    call = StemCall(stem, images, weight, bias, out)
    call.check()
    launch_stem(call, stem_config(call))


def _stem_reference(
    images: Tensor,
    weight: Tensor,
    bias: Tensor,
    out: Tensor,
    target: list[int],
    kernel: int,
    stride: int,
    activation: str,
    exact: bool,
    out_scale: float,
) -> None:
    stem = Stem(PitchedLayout(*target), kernel, stride, activation, exact, out_scale)
    call = StemCall(stem, images, weight, bias, out)
    call.check()
    out.copy_(to_dtype(stem_reference(call), out.dtype, out_scale))


_stem_op = triton_op(
    "conv_stem", _stem_triton, _stem_reference, lambda *_: None, mutates_args=["out"]
)


def conv_stem(
    images: Tensor, weight: Tensor, bias: Tensor, stem: Stem, *, out: Tensor | None = None
) -> Tensor:
    """The first convolution with bias and activation, from images to a pitched map.

    Args:
        images: ``[n, c, h, w]`` fp16, bf16 or fp32, any strides.
        weight: ``[out, kernel * kernel * c]`` fp16, bf16 or fp32, from `pack_weight` (of
            `space_to_depth_weight` in the P6 variants); images are cast to its type.
        bias: ``[out]`` fp32.
        stem: sizes and options.
        out: ``[target.rows, out]`` to write, a channel slice or whole; by default new, of the
            weight's type.

    Returns:
        ``out``, its border zero.

    Raises:
        ValueError: shapes or types do not fit.
    """
    if weight.ndim != 2:
        raise ValueError(f"weight {tuple(weight.shape)} is not a packed matrix")
    if out is None:
        out = stem.target.empty(weight.shape[0], dtype=weight.dtype, device=images.device)
    _stem_op(
        images, weight, bias, out, stem.target.sizes, stem.kernel, stem.stride, stem.activation,
        stem.exact, stem.out_scale,
    )  # fmt: skip
    return out
