"""What a fused convolution computes: its geometry, its weights, its plain PyTorch reference."""

from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from yolov7.kernels.layout import PitchedLayout
from yolov7.kernels.runtime import DTYPE_NAMES

Activation = Literal["silu", "leaky_relu", "none"]
ACTIVATIONS: tuple[Activation, ...] = get_args(Activation)
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
"""What a map of 8 bits holds at the most, in units of its scale."""


@dataclass(frozen=True)
class ConvLayer:
    """A convolution over pitched maps, ``act(conv(x) * scale + bias) [+ residual]``.

    Raises:
        ValueError: the combination of sizes and options is not one that the kernels compute.
    """

    source: PitchedLayout
    """Where the input's pixels lie."""
    target: PitchedLayout
    """Where the output's pixels lie."""
    in_channels: int
    out_channels: int
    kernel: int = 1
    """1, or 3 with a padding of 1."""
    stride: int = 1
    activation: Activation = "silu"
    """silu, leaky_relu (slope 0.1) or none."""
    pool: bool = False
    """Take the maximum of 2x2 pixels of the input first (1x1 only)."""
    exact: bool = False
    """Multiply fp32 exactly instead of as TF32."""
    upsample: bool = False
    """Write every pixel of the output to 2x2 pixels of the target (1x1 only)."""
    out_scale: float = 1.0
    """What one unit of an output of 8 bits stands for; 1 for other types."""
    residual_scale: float = 1.0
    """What one unit of the residual stands for."""

    def __post_init__(self) -> None:
        s, t = self.source, self.target
        if self.kernel not in (1, 3) or self.stride not in (1, 2) or self.kernel < self.stride:
            raise ValueError(f"no kernel for {self.kernel}x{self.kernel}, stride {self.stride}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation!r} is none of {ACTIVATIONS}")
        if min(self.in_channels, self.out_channels) < 1:
            raise ValueError(f"{self.in_channels} -> {self.out_channels} channels")
        if self.kernel == 3 and (self.pool or self.upsample):
            raise ValueError("max-pool on load and upsample on store are for 1x1 convolutions")
        if self.pool and self.upsample:
            raise ValueError("max-pool on load and upsample on store exclude each other")
        h, w = self.result_size
        if (t.n, t.h, t.w) != (s.n, h, w):
            raise ValueError(
                f"{s.n} x {s.h} x {s.w} pixels give {s.n} x {h} x {w}, "
                f"but the target holds {t.n} x {t.h} x {t.w}"
            )
        if self.reduction == 1 and not self.upsample and s != t:
            raise ValueError(f"stride 1 needs equal pitches, not {s} and {t}")
        if self.upsample and (t.pitch > 2 * s.pitch or t.row_pitch > 2 * s.row_pitch):
            raise ValueError(f"the target's border is more than twice the source's: {s}, {t}")

    @property
    def result_size(self) -> tuple[int, int]:
        """Height and width of the output."""
        h, w = self.source.h, self.source.w
        if self.upsample:
            return 2 * h, 2 * w
        if self.pool:
            return h // 2, w // 2
        return (h - 1) // self.stride + 1, (w - 1) // self.stride + 1

    @property
    def reduction(self) -> int:
        """Pixels of the input, each way, for one of the convolution's output: 1 or 2."""
        return 2 if self.pool else self.stride

    @property
    def compute(self) -> PitchedLayout:
        """The layout whose rows are computed: the target, or the source before an upsample."""
        return self.source if self.upsample else self.target

    @property
    def taps(self) -> int:
        """Pixels under the kernel."""
        return self.kernel * self.kernel

    @property
    def length(self) -> int:
        """Terms of the sum that each element of the output is."""
        return self.taps * self.in_channels

    @property
    def flops(self) -> int:
        """Multiplications and additions, border pixels apart."""
        pixels = self.compute.n * self.compute.h * self.compute.w
        return 2 * pixels * self.length * self.out_channels

    def describe(self) -> str:
        """One readable line: ``8x64x80x80 -> 128, 3x3 s1``."""
        s = self.source
        options = "".join(
            f" {name}" for name, on in (("pool", self.pool), ("upsample", self.upsample)) if on
        )
        return (
            f"{s.n}x{self.in_channels}x{s.h}x{s.w} -> {self.out_channels}, "
            f"{self.kernel}x{self.kernel} s{self.stride}{options}"
        )


@dataclass(frozen=True)
class ConvCall:
    """A layer with its tensors, all preallocated: what the launcher takes."""

    layer: ConvLayer
    x: Tensor
    """``[source.rows, in_channels]``, a channel slice or whole; zero border."""
    weight: Tensor
    """``[out_channels, taps * in_channels]``, as `pack_weight` gives it."""
    bias: Tensor
    """``[out_channels]`` fp32."""
    out: Tensor
    """``[target.rows, out_channels]``, a channel slice or whole."""
    scale: Tensor | None = None
    """``[out_channels]`` fp32: the scale of ``x`` times that of each weight row (8 bits)."""
    residual: Tensor | None = None
    """``[target.rows, out_channels]``, added after the activation."""

    @property
    def exact(self) -> bool:
        """Whether products are those of fp32, which no matrix instruction computes."""
        return self.layer.exact and self.x.dtype == torch.float32

    def check(self) -> None:
        """Raise ``ValueError`` unless the tensors fit the layer and each other."""
        layer, x, out = self.layer, self.x, self.out
        n = layer.out_channels
        layer.source.check(x, "input")
        layer.target.check(out, "output")
        expected = {
            "input": (x, (layer.source.rows, layer.in_channels)),
            "weight": (self.weight, (n, layer.taps * layer.in_channels)),
            "bias": (self.bias, (n,)),
            "output": (out, (layer.target.rows, n)),
            "scale": (self.scale, (n,)),
            "residual": (self.residual, (layer.target.rows, n)),
        }
        for name, (tensor, shape) in expected.items():
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{name} {tuple(tensor.shape)} is not {shape}: {layer.describe()}")
            if tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device}, the input on {x.device}")
            if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
                strides = tensor.stride()
                raise ValueError(f"{name} with strides {strides} has no contiguous channels")
        self._check_types()
        if not self.weight.is_contiguous():
            raise ValueError(f"weight with strides {self.weight.stride()} is not contiguous")
        if self.residual is not None and layer.upsample:
            raise ValueError("a residual and an upsample exclude each other")
        if overlap(x, out):
            raise ValueError("input and output are overlapping slices of one buffer")

    def _check_types(self) -> None:
        dtypes = tuple(DTYPE_NAMES)
        if self.x.dtype not in dtypes or self.x.dtype != self.weight.dtype:
            raise ValueError(
                f"input {self.x.dtype} and weight {self.weight.dtype} are not one of {dtypes}"
            )
        if self.out.dtype not in dtypes:
            raise ValueError(f"output {self.out.dtype} is none of {dtypes}")
        if self.residual is not None and self.residual.dtype not in dtypes:
            raise ValueError(f"residual {self.residual.dtype} is none of {dtypes}")
        if self.bias.dtype != torch.float32:
            raise ValueError(f"bias {self.bias.dtype} is not torch.float32")
        if self.scale is not None and self.scale.dtype != torch.float32:
            raise ValueError(f"scale {self.scale.dtype} is not torch.float32")

    def reference(self) -> Tensor:
        """The output map ``[target.rows, out_channels]`` in fp32, in plain PyTorch, zero border."""
        layer = self.layer
        x = layer.source.to_nchw(self.x).float()
        k = layer.kernel
        weight = self.weight.float().view(layer.out_channels, k, k, layer.in_channels)
        if layer.pool:
            x = F.max_pool2d(x, 2)
        y = exact_conv2d(x, weight.permute(0, 3, 1, 2), layer.stride, k // 2)
        if self.scale is not None:
            y = y * self.scale[:, None, None]
        y = activate(y + self.bias.float()[:, None, None], layer.activation)
        if self.residual is not None:
            residual = layer.compute.to_nchw(self.residual).float()
            y = y + residual * layer.residual_scale
        if layer.upsample:
            y = F.interpolate(y, scale_factor=2.0, mode="nearest")
        return layer.target.from_nchw(y)

    def random(self, device: torch.device) -> "ConvCall":
        """The call with memory of its own and random content, outputs O(1)."""
        weight = torch.randn(self.weight.shape, device=device) * self.layer.length**-0.5
        unit = 32.0 if self.x.dtype == torch.int8 else 1.0
        scale, residual = self.scale, self.residual
        if scale is not None:
            quantised, rows = quantise_weight(weight, self.weight.dtype)
            weight, scale = quantised, own_memory(scale, device).copy_(rows / unit)
        if residual is not None:
            residual = _random_map(self.layer.target, residual, device, unit)
        return replace(
            self,
            x=_random_map(self.layer.source, self.x, device, unit),
            weight=weight.to(self.weight.dtype),
            bias=own_memory(self.bias, device).normal_(),
            out=own_memory(self.out, device),
            scale=scale,
            residual=residual,
        )


def own_memory(tensor: Tensor, device: torch.device) -> Tensor:
    """Uninitialised memory of the same shape, strides and alignment."""
    offset = tensor.storage_offset() % 16
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    elements = offset + 1 + sum((n - 1) * stride for n, stride in pairs)
    memory = torch.empty(elements, dtype=tensor.dtype, device=device)
    return memory.as_strided(tensor.shape, tensor.stride(), offset)


def _random_map(
    layout: PitchedLayout, tensor: Tensor, device: torch.device, deviation: float
) -> Tensor:
    matrix = own_memory(tensor, device).zero_()
    pixels = layout.image_view(matrix)
    pixels.copy_(to_dtype(torch.randn(pixels.shape, device=device) * deviation, tensor.dtype, 1.0))
    return matrix


def epilogue_activation(activation: Activation, out_dtype: torch.dtype) -> str:
    """The activation as the kernels take it: SiLU is approximate unless the output is fp32."""
    fast = activation == "silu" and out_dtype != torch.float32
    return "fast_silu" if fast else activation


def pack_weight(*weights: Tensor) -> Tensor:
    """Convolution weights as one matrix, rows contiguous.

    Args:
        weights: ``[out, in, k, k]`` each; several of one input (the two entries of an ELAN) become
            one product that writes neighbouring channel slices.

    Returns:
        ``[sum of out, k * k * in]``: output channel, then kernel row, column, input channel.
    """
    packed = [w.permute(0, 2, 3, 1).reshape(w.shape[0], -1) for w in weights]
    return torch.cat(packed).contiguous()


def quantise_weight(weight: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A packed weight ``[out, k]`` in a type of `LARGEST`, and the scale ``[out]`` of each row."""
    scale = weight.float().abs().amax(1).clamp_min(1e-12) / LARGEST[dtype]
    return to_dtype(weight.float() / scale[:, None], dtype, 1.0), scale


def activate(x: Tensor, activation: Activation) -> Tensor:
    """SiLU, LeakyReLU of slope 0.1, or nothing."""
    if activation == "silu":
        return F.silu(x)
    return F.leaky_relu(x, 0.1) if activation == "leaky_relu" else x


def to_dtype(x: Tensor, dtype: torch.dtype, scale: float) -> Tensor:
    """``x / scale`` in the output's type; 8 bits saturate, and int8 is rounded to even."""
    if dtype in LARGEST:
        x = (x / scale).clamp(-LARGEST[dtype], LARGEST[dtype])
    return x.round().to(dtype) if dtype == torch.int8 else x.to(dtype)


def overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two maps ``[rows, c]`` share elements; slices of one buffer share its row stride."""
    if a.device.type == "meta" or a.numel() == 0 or b.numel() == 0:
        return False
    if a.untyped_storage().data_ptr() != b.untyped_storage().data_ptr():
        return False
    spans = [
        (t.data_ptr(), t.data_ptr() + t.element_size() * (1 + (t.shape[0] - 1) * t.stride(0)))
        for t in (a, b)
    ]
    if max(start for start, _ in spans) >= min(
        end + t.element_size() * (t.shape[1] - 1) for (_, end), t in zip(spans, (a, b), strict=True)
    ):
        return False
    pitch_a, pitch_b = (t.stride(0) * t.element_size() for t in (a, b))
    if pitch_a != pitch_b:
        return True
    shift = (b.data_ptr() - a.data_ptr()) % pitch_a
    return shift < a.shape[1] * a.element_size() or (
        pitch_a - shift < b.shape[1] * b.element_size()
    )


def exact_conv2d(x: Tensor, weight: Tensor, stride: int, padding: int) -> Tensor:
    """PyTorch's convolution in true fp32: cuDNN's own choice is TF32."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        return F.conv2d(x, weight, stride=stride, padding=padding)
