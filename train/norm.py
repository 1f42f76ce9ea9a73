"""Batch norm and activation as one operation, forward and backward, in a model that is trained."""

import copy
from collections.abc import Iterator
from typing import Literal

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from yolov7.blocks import Conv, activation_name
from yolov7.errors import first_line
from yolov7.kernels.bn_silu import batch_norm_act
from yolov7.model import YOLOv7
from yolov7.train.precision import autocast

KernelsName = Literal["auto", "on", "off"]
# Largest relative RMS to PyTorch in fp32. Both sum in fp32, in another order: 1e-6 is usual. The
# result is rounded once more, to 8 bits in bf16, to 11 in fp16, which is 2^-9 and 2^-12 at most.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 4e-3, torch.float16: 1e-3}
# More of a gradient: of a million z, rounding changes the sign of one, and LeakyReLU's slope there.
FLIPPED = 5e-3


class NormAct(nn.BatchNorm2d):
    """A batch norm that applies the activation too; its tensors are those of the one it replaces.

    Args:
        norm: whose parameters and statistics it takes over.
        activation: "silu", "leaky_relu" or "none".
        synced: the batches of all processes are normalised together.
    """

    def __init__(self, norm: nn.BatchNorm2d, activation: str, *, synced: bool) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.activation = activation
        self.synced = synced

    def forward(self, x: Tensor) -> Tensor:
        """Normalise and activate `[B, C, H, W]`."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if self.training:
            self.num_batches_tracked.add_(1)
        return batch_norm_act(
            x,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            training=self.training,
            momentum=self.momentum,
            eps=self.eps,
            activation=self.activation,
            group=dist.group.WORLD if self.synced else None,
        )

    def plain(self, x: Tensor) -> Tensor:
        """The same by PyTorch, in fp32; of one process, as if the statistics had not changed."""
        z = F.batch_norm(x.float(), None, None, self.weight, self.bias, True, 0.0, self.eps)
        match self.activation:
            case "silu":
                return F.silu(z)
            case "leaky_relu":
                return F.leaky_relu(z, 0.1)
            case _:
                return z


def join_norms(model: nn.Module, *, synced: bool = False) -> None:
    """Let every `Conv` of a model normalise and activate at once, in place.

    Where the batches of all processes are normalised together, so do the norms that no activation
    follows. The names of the tensors stay as they are. The model cannot be fused any more: that is
    for copies made before, such as the moving average.
    """
    for module in list(model.modules()):
        if isinstance(module, Conv) and type(module.bn) is nn.BatchNorm2d:
            module.bn = NormAct(module.bn, activation_name(module), synced=synced)
            module.act = nn.Identity()
        for name, child in list(module.named_children()):
            if synced and type(child) is nn.BatchNorm2d:
                setattr(module, name, NormAct(child, "none", synced=True))


def why_not_fused(model: YOLOv7, shape: tuple[int, int, int, int], dtype: torch.dtype) -> str:
    """Try the fused operation at every norm of a model, forward and backward.

    Args:
        model: in training form, stays as it is.
        shape: of the first step's images, `[B, 3, H, W]`.
        dtype: what the network computes in.

    Returns:
        Why it cannot be used: it does not compile or run here, or it differs from PyTorch's by
        more than rounding. Empty: it can.
    """
    probe = copy.deepcopy(model).train()
    join_norms(probe)
    device = model.head.anchors.device
    images = torch.rand(shape, device=device, generator=torch.Generator(device).manual_seed(0))
    different: list[str] = []

    def compare(name: str, norm: NormAct, x: Tensor) -> None:
        with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            for what, error in _errors(norm, x.detach()):
                limit = TOLERANCES[dtype] + (FLIPPED if what == "gradient" else 0)
                if not error <= limit:  # nor NaN
                    different.append(
                        f"the {what} of {name} differs from PyTorch's by {error:.1e}, more than "
                        f"{limit:.0e}"
                    )

    for name, module in probe.named_modules():
        if isinstance(module, NormAct):
            module.register_forward_pre_hook(
                lambda norm, inputs, name=name: compare(name, norm, inputs[0])
            )
    try:
        with torch.no_grad(), autocast(device, dtype):
            probe(images.contiguous(memory_format=torch.channels_last))
    except Exception as error:  # whatever a compiler, a driver or a launch raises
        return first_line(error)
    return different[0] if different else ""


def _errors(norm: NormAct, x: Tensor) -> Iterator[tuple[str, float]]:
    """Relative RMS to PyTorch's of the output and of the gradient of x `[B, C, H, W]`."""
    ours, theirs = x.clone().requires_grad_(), x.float().requires_grad_()
    y, wanted = norm.forward(ours), norm.plain(theirs)  # forward: without the hook that is here
    dy = y.detach() + 1  # of which both sums of the backward matter
    (dx,) = torch.autograd.grad(y, ours, dy)
    (dx_wanted,) = torch.autograd.grad(wanted, theirs, dy.float())
    for name, a, b in (("output", y, wanted), ("gradient", dx, dx_wanted)):
        rms = (a.float() - b).square().mean().sqrt() / b.square().mean().sqrt().clamp(min=1e-12)
        yield name, float(rms.detach())  # host synchronisation: once a run
