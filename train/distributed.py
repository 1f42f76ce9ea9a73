"""Training on several processes, as torchrun starts them."""

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from yolov7.errors import UserError
from yolov7.train.norm import KernelsName, join_norms

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

    def say(self, text: str) -> None:
        """Print a line, once for all processes; nothing, where there is nothing to say."""
        if self.main and text:
            print(text, flush=True)


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


def use_kernels(
    choice: KernelsName, device: torch.device, why_not: Callable[[], str], ranks: Ranks
) -> bool:
    """Whether norms and activations of a model run by our kernels.

    Args:
        choice: auto: on CUDA, where they work; on: on a CPU too, by their plain references.
        device: where the model lies.
        why_not: tries them and says why they do not work here; empty: they do.
        ranks: which process this is.

    Raises:
        UserError: they are asked for and do not work on every process.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False
    reason = next(filter(None, collect(why_not(), ranks)), "")
    if reason and choice == "on":
        raise UserError(f"--kernels on: {reason}: use auto or off")
    if reason:
        ranks.say(f"warning: norms and activations run by PyTorch, not by our kernels: {reason}")
    return not reason


def over_ranks(
    model: nn.Module, device: torch.device, ranks: Ranks, *, sync_bn: bool, fused: bool
) -> nn.Module:
    """A model as it is called in training: over all processes, if there are several.

    Args:
        model: changed in place.
        device: where it lies.
        ranks: which process this is.
        sync_bn: batch norm statistics over all processes.
        fused: batch norm and activation by our kernels.
    """
    synced = sync_bn and ranks.world > 1
    if fused or (synced and device.type == "cpu"):  # PyTorch's runs on GPUs only
        join_norms(model, synced=synced)
    elif synced:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if ranks.world == 1:
        return model
    # Vectors stored channels last: DDP's remark on their strides is about nothing.
    warnings.filterwarnings("ignore", message="Grad strides do not match")
    ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(model, device_ids=ids)
