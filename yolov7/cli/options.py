"""Options that several verbs share, with one meaning everywhere."""

from dataclasses import dataclass, fields
from pathlib import Path

from yolov7.checkpoint import DEMO
from yolov7.dataset.description import read_names, read_yaml
from yolov7.engine.choose import Engine, Layout, Precision, Runtime


@dataclass(kw_only=True)
class ModelOptions:
    """The model, and how it runs."""

    weights: str | None = None
    """.safetensors, the authors' .pt, an exported .onnx, .xml or .pt2, a published name such as
    yolov7.pt, or blood-cells, the embedded demo (default, but for predict --source)"""
    variant: str | None = None
    """variant of a bare state dict, where its tensors do not tell (default: recognised)"""
    imgsz: int | None = None
    """longer side in pixels, rounded up to the model's stride (default: the checkpoint's)"""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N (or N), or mps (Apple's, untested)"""
    precision: Precision = "auto"
    """arithmetic of the network; auto: fp16 on CUDA, fp32 on a CPU; int8 (engine eager on a CPU, or
    graph) and fp8 (graph): of weights from yolov7 convert --precision int8 or fp8"""
    engine: Engine = "auto"
    """eager: PyTorch, fused; compile: torch.compile, slower to start; graph: our kernels (CUDA);
    openvino: for .onnx files, which ONNX Runtime runs else, and .xml files"""
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


# File of the authors' release -> MB, about: two bytes a parameter.
COCO_WEIGHTS = {
    "yolov7-tiny.pt": 13,
    "yolov7.pt": 75,
    "yolov7x.pt": 143,
    "yolov7-w6.pt": 141,
    "yolov7-e6.pt": 195,
    "yolov7-d6.pt": 268,
    "yolov7-e6e.pt": 304,
}


def which_weights() -> str:
    """What there is to choose from, in a few lines."""
    files = "\n".join(f"  {name:<16}about {mb:>3} MB" for name, mb in COCO_WEIGHTS.items())
    return (
        "which weights? add --weights with a file of yours, or with one of these:\n"
        "the 80 classes of COCO, downloaded on first use from the authors' release (GPL-3.0)\n"
        f"{files}\n"
        "red and white blood cells and platelets, the embedded demo (Apache-2.0)\n"
        f"  {DEMO}"
    )


def class_names(names: tuple[str, ...]) -> list[str] | None:
    """The class names of the option `names`; None where it is not given.

    Raises:
        UserError: A data.yaml without names.
    """
    if len(names) != 1 or Path(names[0]).suffix not in (".yaml", ".yml"):
        return list(names) or None
    path = Path(names[0])
    return read_names(path, read_yaml(path))
