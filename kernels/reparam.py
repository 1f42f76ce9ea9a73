"""Planned re-parameterisation: RepConv folded into one 3x3 convolution, on the device.

RepConv is BN(3x3(x)) + BN(1x1(x)) [+ BN(x) where the channels match] (section 4.1 of the paper).
With s = scale / sqrt(variance + eps) of each norm, per output channel k,

    W'[k, c] = s3 W3[k, c], and in the centre tap also + s1 W1[k, c] + (k == c) si,
    b'[k] = sum over the branches of shift - mean s,

computed in fp32 and rounded once. The weight comes as `conv` takes it, [K, 9 C], output channel,
then kernel row, column, input channel: reading [K, C, 3, 3] and writing that is the kernel's work.

Expected on an H200 at 4.3 TB/s: 1024 -> 1024 channels, fp32 in, fp16 out, move 37.7 + 4.2 MB and
18.9 MB, 14 us. PyTorch takes a dozen launches, each over the whole weight.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov7.kernels.runtime import FLOATS, Config, launch, tl, triton, triton_op


def reparam_reference(
    dense: Tensor,
    pointwise: Tensor,
    dense_norm: Tensor,
    pointwise_norm: Tensor,
    identity_norm: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The fold in plain PyTorch; arguments and results as in `reparam`."""
    weight, bias = _fold(dense, dense_norm, eps)
    weight_1x1, bias_1x1 = _fold(F.pad(pointwise, [1, 1, 1, 1]), pointwise_norm, eps)
    weight, bias = weight + weight_1x1, bias + bias_1x1
    if identity_norm is not None:
        eye = torch.eye(weight.shape[0], device=weight.device)[:, :, None, None]
        weight_id, bias_id = _fold(F.pad(eye, [1, 1, 1, 1]), identity_norm, eps)
        weight, bias = weight + weight_id, bias + bias_id
    return weight.permute(0, 2, 3, 1).reshape(weight.shape[0], -1).to(dtype).contiguous(), bias


def _fold(weight: Tensor, norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    scale, shift, mean, variance = norm
    factor = scale / (variance + eps).sqrt()
    return weight.float() * factor[:, None, None, None], shift - mean * factor


@triton.jit
def _factor(norm_ptr, channel, channels, eps):
    """What a norm multiplies a channel by, and what it adds."""
    scale, shift = tl.load(norm_ptr + channel), tl.load(norm_ptr + channels + channel)
    mean = tl.load(norm_ptr + 2 * channels + channel)
    variance = tl.load(norm_ptr + 3 * channels + channel)
    factor = tl.div_rn(scale, tl.sqrt_rn(variance + eps))
    return factor, shift - mean * factor


@triton.jit
def _reparam_kernel(
    # Tensors
    dense_ptr,  # [K, C, 3, 3]
    pointwise_ptr,  # [K, C]
    dense_norm_ptr,  # [4, K] fp32: scale, shift, mean, variance
    pointwise_norm_ptr,  # [4, K] fp32
    identity_norm_ptr,  # [4, K] fp32 or None
    weight_ptr,  # [K, 9 C]
    bias_ptr,  # [K] fp32
    # Shapes
    K,
    C,
    # Scalars
    eps,
    # Constexprs
    BLOCK_C: tl.constexpr,
):
    """BLOCK_C input channels of one output channel, all nine taps."""
    k = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = offs_c < C
    factor, bias = _factor(dense_norm_ptr, k, K, eps)
    factor_1x1, bias_1x1 = _factor(pointwise_norm_ptr, k, K, eps)
    bias += bias_1x1
    centre = tl.load(pointwise_ptr + k * C + offs_c, mask=mask, other=0.0).to(tl.float32)
    centre *= factor_1x1
    if identity_norm_ptr is not None:
        factor_id, bias_id = _factor(identity_norm_ptr, k, K, eps)
        bias += bias_id
        centre += tl.where(offs_c == k, factor_id, 0.0)
    for tap in tl.static_range(9):
        dense = tl.load(dense_ptr + (k * C + offs_c) * 9 + tap, mask=mask, other=0.0)
        value = dense.to(tl.float32) * factor
        if tap == 4:
            value += centre
        out_ptrs = weight_ptr + (k * 9 + tap) * C + offs_c
        tl.store(out_ptrs, value.to(weight_ptr.dtype.element_ty), mask=mask)
    if tl.program_id(1) == 0:
        tl.store(bias_ptr + k, bias)


def launch_reparam(
    dense: Tensor,
    pointwise: Tensor,
    dense_norm: Tensor,
    pointwise_norm: Tensor,
    identity_norm: Tensor | None,
    eps: float,
    weight: Tensor,
    bias: Tensor,
    config: Config,
) -> None:
    """Start the kernel; nothing is allocated or checked."""
    channels_out, channels_in = dense.shape[:2]
    args = {
        "dense_ptr": dense,
        "pointwise_ptr": pointwise,
        "dense_norm_ptr": dense_norm,
        "pointwise_norm_ptr": pointwise_norm,
        "identity_norm_ptr": identity_norm,
        "weight_ptr": weight,
        "bias_ptr": bias,
        "K": channels_out,
        "C": channels_in,
        "eps": eps,
    }
    grid = (channels_out, triton.cdiv(channels_in, config["BLOCK_C"]))
    launch(_reparam_kernel, grid, args, config)


def _reparam_triton(
    dense: Tensor,
    pointwise: Tensor,
    dense_norm: Tensor,
    pointwise_norm: Tensor,
    identity_norm: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    weight, bias = _reparam_fake(
        dense, pointwise, dense_norm, pointwise_norm, identity_norm, eps, dtype
    )
    config = {"BLOCK_C": min(256, triton.next_power_of_2(dense.shape[1])), "num_warps": 2}
    launch_reparam(
        dense, pointwise, dense_norm, pointwise_norm, identity_norm, eps, weight, bias, config
    )
    return weight, bias


def _reparam_fake(
    dense: Tensor,
    pointwise: Tensor,  # noqa: ARG001 - the operation's schema
    dense_norm: Tensor,  # noqa: ARG001 - the operation's schema
    pointwise_norm: Tensor,  # noqa: ARG001 - the operation's schema
    identity_norm: Tensor | None,  # noqa: ARG001 - the operation's schema
    eps: float,  # noqa: ARG001 - the operation's schema
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    channels_out, channels_in = dense.shape[:2]
    weight = dense.new_empty((channels_out, 9 * channels_in), dtype=dtype)
    return weight, dense.new_empty(channels_out, dtype=torch.float32)


_reparam_op = triton_op("reparam", _reparam_triton, reparam_reference, _reparam_fake)


def reparam(
    dense: Tensor,
    pointwise: Tensor,
    dense_norm: Tensor,
    pointwise_norm: Tensor,
    identity_norm: Tensor | None = None,
    *,
    eps: float = 1e-3,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor]:
    """Fold the branches of a RepConv.

    Args:
        dense: [K, C, 3, 3] fp32, fp16 or bf16.
        pointwise: [K, C, 1, 1] of the same type.
        dense_norm: [4, K] fp32: scale, shift, running mean and running variance of its norm.
        pointwise_norm: [4, K] fp32, likewise.
        identity_norm: [4, K] fp32 of the identity branch, which needs K = C; None without it.
        eps: of all norms.
        dtype: of the result: fp32, fp16 or bf16.

    Returns:
        The weight [K, 9 C] as `yolov7.kernels.conv` takes it, and the bias [K] fp32.

    Raises:
        ValueError: shapes, types or devices do not fit.
    """
    shape = list(dense.shape)
    if len(shape) != 4 or shape[2:] != [3, 3] or list(pointwise.shape) != [*shape[:2], 1, 1]:
        raise ValueError(f"weights are {shape} and {list(pointwise.shape)}, not 3x3 and 1x1")
    if not {dense.dtype, dtype} <= set(FLOATS.values()) or pointwise.dtype != dense.dtype:
        raise ValueError(f"weights are {dense.dtype} and {pointwise.dtype}, to become {dtype}")
    for norm in (dense_norm, pointwise_norm, identity_norm):
        if norm is None:
            continue
        if list(norm.shape) != [4, shape[0]] or norm.dtype != torch.float32:
            raise ValueError(f"a norm is {norm.dtype} {list(norm.shape)}, not fp32 [4, {shape[0]}]")
        if norm.device != dense.device or pointwise.device != dense.device:
            raise ValueError(f"a norm on {norm.device}, weights on {dense.device}")
    if identity_norm is not None and shape[0] != shape[1]:
        raise ValueError(f"no identity from {shape[1]} to {shape[0]} channels")
    identity_norm = None if identity_norm is None else identity_norm.contiguous()
    norms = (dense_norm.contiguous(), pointwise_norm.contiguous(), identity_norm)
    weights = (dense.contiguous(), pointwise.contiguous())
    result: tuple[Tensor, Tensor] = _reparam_op(*weights, *norms, eps, dtype)
    return result


def compile_cases(precision: str = "fp16") -> Iterator[tuple[str, Callable[[], object]]]:
    """Launches to compile ahead of time, see `yolov7.kernels.runtime.CompileSpec`."""
    dense = torch.empty((512, 512, 3, 3), device="meta")
    pointwise = torch.empty((512, 512, 1, 1), device="meta")
    norm = torch.empty((4, 512), device="meta")
    dtype = FLOATS.get(precision, torch.float16)
    for identity in (None, norm):
        call = partial(_reparam_triton, dense, pointwise, norm, norm, identity, 1e-3, dtype)
        yield f"512 -> 512 {precision}{'' if identity is None else ' identity'}", call
