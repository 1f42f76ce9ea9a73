"""The optimizer, its parameter groups, and the check that its gradients are finite."""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Adam, AdamW, Optimizer

from yolov7.train.schedule import Rates

OptimizerName = Literal["sgd", "adam", "adamw"]


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Biases; convolution weights, which decay; the rest (batch norms, implicit vectors)."""
    biases: list[Tensor] = []
    weights: list[Tensor] = []
    others: list[Tensor] = []
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            if name == "bias":
                biases.append(parameter)
            elif name == "weight" and isinstance(module, nn.Conv2d):
                weights.append(parameter)
            else:
                others.append(parameter)
    return [
        {"params": biases, "kind": "bias"},
        {"params": weights, "kind": "weight", "weight_decay": weight_decay},
        {"params": others, "kind": "other"},
    ]


def build_optimizer(model: nn.Module, name: OptimizerName, weight_decay: float) -> Optimizer:
    """SGD with Nesterov momentum, Adam or AdamW; the rates are set before every step."""
    groups = parameter_groups(model, weight_decay)
    if name != "sgd":
        return {"adam": Adam, "adamw": AdamW}[name](groups, lr=0.0, weight_decay=0.0)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=True, weight_decay=0.0)


def set_rates(optimizer: Optimizer, rates: Rates) -> None:
    """Make the optimizer work with `rates`."""
    for group in optimizer.param_groups:
        group["lr"] = rates.bias_lr if group["kind"] == "bias" else rates.lr
        if "betas" in group:
            group["betas"] = (rates.momentum, group["betas"][1])
        else:
            group["momentum"] = rates.momentum


def gradient_norm(model: nn.Module) -> float:
    """The norm of all gradients together; not finite if any of them is not."""
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    norm = nn.utils.get_total_norm(gradients)
    return float(norm)  # host synchronisation: once a step, which the finite check costs


def clip_gradients(model: nn.Module, norm: float, limit: float) -> None:
    """Scale the gradients so that their norm, `norm` now, is at most `limit`; 0: no limit."""
    if limit and norm > limit:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, limit / (norm + 1e-6))


def first_bad_tensor(model: nn.Module, terms: dict[str, Tensor]) -> str:
    """Name what is not finite: a loss term, else a weight, else a gradient."""

    def tensors() -> Iterator[tuple[str, Tensor]]:
        yield from ((f"loss term {name}", term) for name, term in terms.items())
        yield from ((f"weight {name}", p) for name, p in model.named_parameters())
        for name, p in model.named_parameters():
            if p.grad is not None:
                yield f"gradient of {name}", p.grad

    for name, tensor in tensors():
        if not math.isfinite(float(tensor.detach().abs().amax())):  # host synchronisation: rare
            return name
    return "the norm of the gradients"


def restore_buffers(model: nn.Module, good: nn.Module) -> None:
    """Replace running statistics that are no longer finite by those of `good`."""
    sound = dict(good.named_buffers())
    for name, buffer in model.named_buffers():
        if not bool(buffer.isfinite().all()):  # host synchronisation: rare
            buffer.copy_(sound[name])
