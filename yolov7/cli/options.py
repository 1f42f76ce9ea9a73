"""Options that several verbs share, with one meaning everywhere."""

from dataclasses import dataclass, fields
from pathlib import Path

from yolov7.dataset.description import read_names, read_yaml
from yolov7.engine.choose import Engine, Layout, Precision, Runtime


@dataclass(kw_only=True)
class ModelOptions:
    """The model, and how it runs."""

    weights: str | None = None
    """.safetensors, the authors' .pt, an exported .onnx or .pt2, or a published name such as
    yolov7.pt (None: the embedded blood-cell demo weights)"""
    variant: str | None = None
    """variant of a bare state dict, where its tensors do not tell (None: recognised)"""
    imgsz: int | None = None
    """longer side in pixels, rounded up to the model's stride (None: the checkpoint's)"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N (or N), or mps (Apple's, untested)"""
    precision: Precision = "auto"
    """arithmetic of the network; auto: fp16 on CUDA, fp32 on a CPU; fp8: with the engine graph and
    weights from yolov7 convert --precision fp8"""
    engine: Engine = "auto"
    """eager: PyTorch, fused; compile: torch.compile, slower to start; graph: our kernels (CUDA);
    openvino: for .onnx files, which ONNX Runtime runs else"""
    names: tuple[str, ...] = ()
    """class names of an .onnx file that yolov7 export did not write, or a data.yaml with them"""
    layout: Layout | None = None
    """of such a file's output: grid [B, N, 5 + classes] or classes-first [B, 4 + classes, N]"""
    trust: bool = False
    """load a .pt2, which may execute anything, because you know who made it"""

    def runtime(self) -> Runtime:
        """What these options say to the engines."""
        chosen = {field.name: getattr(self, field.name) for field in fields(Runtime)}
        return Runtime(**{**chosen, "names": class_names(self.names)})


def class_names(names: tuple[str, ...]) -> list[str] | None:
    """The class names of the option `names`; None where it is not given.

    Raises:
        UserError: A data.yaml without names.
    """
    if len(names) != 1 or Path(names[0]).suffix not in (".yaml", ".yml"):
        return list(names) or None
    path = Path(names[0])
    return read_names(path, read_yaml(path))
