"""Training on several processes, as torchrun starts them."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from yolov7.train.norm import join_norms

TIMEOUT = timedelta(minutes=30)  # for a rank that waits while another evaluates


@dataclass(frozen=True)
class Ranks:
    """Which process this is.

    Args:
        rank: of this process.
        world: number of processes.
        local: of this process on its machine, which is its GPU.
    """

    rank: int = 0
    world: int = 1
    local: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes and reports."""
        return self.rank == 0


@contextmanager
def process_group(device: torch.device) -> Iterator[Ranks]:
    """Join the group that torchrun's environment describes; without one, train alone."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield Ranks()
        return
    ranks = Ranks(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    cuda = device.type == "cuda"
    if cuda:
        torch.cuda.set_device(ranks.local)
    dist.init_process_group("nccl" if cuda else "gloo", timeout=TIMEOUT)
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def share(value: Any, ranks: Ranks) -> Any:
    """The main process's value, on every process."""
    if ranks.world == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def collect(value: Any, ranks: Ranks) -> list[Any]:
    """Every process's value, in the order of ranks, on every process."""
    if ranks.world == 1:
        return [value]
    values: list[Any] = [None] * ranks.world
    dist.all_gather_object(values, value)
    return values


def synchronise(model: nn.Module, ranks: Ranks) -> None:
    """Give every process the main process's tensors."""
    if ranks.world > 1:
        for tensor in model.state_dict().values():
            dist.broadcast(tensor, src=0)


class _SumOverRanks(torch.autograd.Function):
    """Sum of a tensor over all processes; its gradient is the sum of theirs."""

    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        total = gradients[0].clone()
        dist.all_reduce(total)
        return total


def _sum_over_ranks(x: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(x)  # type: ignore[no-untyped-call]  # torch's is untyped
    return total


class SyncBatchNorm(nn.BatchNorm2d):
    """Batch norm whose statistics are those of all processes; PyTorch's runs on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalise `[B, C, H, W]`."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        if not self.training:
            return super().forward(x)
        dtype = x.dtype
        # Under autocast x is bf16, too coarse for sums.
        x = x.to(self.running_mean.dtype)
        count = x.numel() // x.shape[1] * dist.get_world_size()
        total = _sum_over_ranks(x.sum((0, 2, 3)))
        centred = x - (total / count)[:, None, None]
        squares = _sum_over_ranks(centred.square().sum((0, 2, 3)))
        variance = squares / count
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(total / count, self.momentum)
            self.running_var.lerp_(squares / (count - 1), self.momentum)
        scale = self.weight / torch.sqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(dtype)


def synchronise_batch_norms(model: nn.Module, device: torch.device) -> None:
    """Replace the batch norms of a model, in place, keeping their tensors."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.BatchNorm2d:
                if device.type == "cuda":
                    convert: Any = nn.SyncBatchNorm.convert_sync_batchnorm
                    synced: nn.Module = convert(child)
                else:
                    synced = SyncBatchNorm(child.num_features, child.eps, child.momentum)
                    synced._parameters, synced._buffers = child._parameters, child._buffers
                setattr(module, name, synced)


def over_ranks(model: nn.Module, device: torch.device, ranks: Ranks, *, sync_bn: bool) -> nn.Module:
    """A model as it is called in training: over all processes, if there are several."""
    sync = sync_bn and ranks.world > 1
    if device.type == "cuda":
        join_norms(model, dist.group.WORLD if sync else None)
    if sync:
        synchronise_batch_norms(model, device)
    if ranks.world == 1:
        return model
    # Vectors stored channels last: DDP's remark on their strides is about nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)
