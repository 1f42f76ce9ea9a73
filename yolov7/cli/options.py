"""Options that several verbs share, with one meaning everywhere."""

from dataclasses import dataclass
from typing import Literal

Precision = Literal["auto", "fp32", "fp16", "bf16"]
Engine = Literal["auto", "eager", "compile"]


@dataclass(kw_only=True)
class ModelOptions:
    """The model, and how it runs."""

    weights: str | None = None
    """.safetensors, the authors' .pt, or a published name such as yolov7.pt (None: the embedded
    blood-cell demo weights)"""
    variant: str | None = None
    """variant of a bare state dict, where its tensors do not tell (None: recognised)"""
    imgsz: int | None = None
    """longer side in pixels, rounded up to the model's stride (None: the checkpoint's)"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N"""
    precision: Precision = "auto"
    """arithmetic of the network; auto: fp16 on CUDA, fp32 on a CPU"""
    engine: Engine = "auto"
    """eager: PyTorch, fused; compile: torch.compile, slower to start"""
