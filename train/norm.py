"""Batch norm and activation as one operation, forward and backward, in a model that is trained."""

import torch.distributed as dist
from torch import Tensor, nn

from yolov7.blocks import Conv
from yolov7.kernels.bn_silu import batch_norm_act


class NormAct(nn.BatchNorm2d):
    """A batch norm that applies the activation too; its tensors are those of the one it replaces.

    Args:
        norm: whose parameters and statistics it takes over.
        activation: "silu" or "leaky_relu".
        group: processes whose batches are normalised together; None: this one alone.
    """

    def __init__(
        self, norm: nn.BatchNorm2d, activation: str, group: dist.ProcessGroup | None
    ) -> None:
        super().__init__(norm.num_features, norm.eps, norm.momentum)
        self._parameters, self._buffers = norm._parameters, norm._buffers
        self.activation = activation
        self.group = group

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
            group=self.group,
        )


def join_norms(model: nn.Module, group: dist.ProcessGroup | None = None) -> None:
    """Let every `Conv` of a model normalise and activate at once, in place.

    The names of the tensors stay as they are. The model cannot be fused any more: that is for
    copies made before, such as the moving average.
    """
    for module in model.modules():
        if isinstance(module, Conv) and type(module.bn) is nn.BatchNorm2d:
            activation = "silu" if isinstance(module.act, nn.SiLU) else "leaky_relu"
            module.bn = NormAct(module.bn, activation, group)
            module.act = nn.Identity()
