"""Running what `yolov7 export` wrote: an .onnx or .pt2 file in the place of a `Network`.

Every file carries its description, `Metadata`; whatever the file's outputs look like, the network
made of it takes and returns what the model itself does.
"""

import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from yolov7.device import parse_device, resolve_device
from yolov7.errors import UserError

FORMAT = "yolov7-triton-export/1"
PT2_ENTRY = "yolov7.json"  # of the metadata among a .pt2's extra files
SUFFIXES = frozenset({".onnx", ".pt2"})

Kind = Literal["onnx", "torch-export", "aoti"]
Layout = Literal["grid", "classes-first", "detections"]
Precision = Literal["fp32", "fp16"]


@dataclass(frozen=True)
class Suppression:
    """Thresholds of the non-maximum suppression inside a file."""

    conf: float  # that a detection's score exceeds, 0..1
    iou: float  # with a better detection of its class above which one is dropped, 0..1
    max_det: int  # detections per image


@dataclass(frozen=True)
class Metadata:
    """What a file says of itself: stored key by key, each value as JSON.

    Attributes:
        format: `FORMAT`.
        kind: What the file is; tells the two kinds of .pt2 apart.
        variant: Key of `yolov7.variants.VARIANTS`.
        names: Class names by number.
        stride: The model's coarsest, pixels.
        imgsz: (height, width) of the network's input, pixels.
        batch: Images per call, or "dynamic".
        precision: Of weights and convolutions; input and output are fp32 always.
        layout: Of the output. grid [B, N, 5 + nc]: centre x, centre y, width, height, objectness,
            class probabilities. classes-first [B, 4 + nc, N]: the box, then objectness x class.
            detections [B, max_det, 6]: x1, y1, x2, y2, score, class, and counts [B].
        letterbox: The input is one uint8 [H, W, 3] BGR image of any size, and boxes are in its
            pixels; else images [B, 3, h, w] RGB in 0..1, and boxes are in pixels of these.
        nms: With the layout "detections", its thresholds.
        device: Where a .pt2 runs: "cpu" or "cuda".
        version: Of this package, when it wrote the file.
    """

    format: str
    kind: Kind
    variant: str
    names: list[str]
    stride: int
    imgsz: tuple[int, int]
    batch: int | Literal["dynamic"]
    precision: Precision
    layout: Layout
    letterbox: bool
    nms: Suppression | None
    device: str
    version: str

    def to_text(self) -> dict[str, str]:
        """The values as JSON."""
        return {key: json.dumps(value) for key, value in asdict(self).items()}

    @classmethod
    def from_text(cls, text: dict[str, str], path: Path) -> "Metadata":
        """Inverse of `to_text`.

        Raises:
            UserError: Something is missing, or of a newer format.
        """
        known = _parse(text)
        missing = [field.name for field in fields(cls) if field.name not in known]
        if missing:
            raise UserError(
                f"{path}: not written by `yolov7 export`: its metadata lacks {', '.join(missing)}"
            )
        if known["format"] != FORMAT:
            raise UserError(f"{path}: of format {known['format']}; this version reads {FORMAT}")
        nms = known["nms"]
        return cls(
            **{
                **known,
                "imgsz": (int(known["imgsz"][0]), int(known["imgsz"][1])),
                "nms": None if nms is None else Suppression(**nms),
            }
        )


def _parse(text: dict[str, str]) -> dict[str, Any]:
    """Those of our keys whose values are JSON."""
    known = {}
    for field in fields(Metadata):
        try:
            known[field.name] = json.loads(text[field.name])
        except (KeyError, json.JSONDecodeError):
            continue
    return known


class OnnxSession:
    """ONNX Runtime on a CPU or, where its GPU package is installed, on CUDA."""

    def __init__(self, file: Path | bytes, device: str | torch.device) -> None:
        chosen = parse_device("cuda" if device == "auto" else device)
        if chosen.type == "cuda" and device != "auto" and torch.cuda.device_count():
            resolve_device(chosen)  # a PyTorch without CUDA cannot tell how many there are
        try:
            import onnxruntime
        except ImportError:
            raise UserError(
                f"{_name(file)}: running it needs ONNX Runtime: pip install 'yolov7-triton[export]'"
            ) from None
        cuda = "CUDAExecutionProvider"
        on_gpu = chosen.type == "cuda" and cuda in onnxruntime.get_available_providers()
        if chosen.type == "cuda" and not on_gpu and device != "auto":
            raise UserError(f"device {device}: ONNX Runtime has none: pip install onnxruntime-gpu")
        self.engine = "onnxruntime-cuda" if on_gpu else "onnxruntime"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3  # errors; warnings are for the author of the graph
        providers = [*[(cuda, {"device_id": chosen.index or 0})] * on_gpu, "CPUExecutionProvider"]
        source = file if isinstance(file, bytes) else str(file)
        try:
            self._session = onnxruntime.InferenceSession(source, options, providers=providers)
        except Exception as error:  # its exceptions share no base
            raise _unreadable(_name(file), "an ONNX file", error) from None
        (self._input, *_) = self._session.get_inputs()
        self.shape = [d if isinstance(d, int) else None for d in self._input.shape]
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)
        types = {"tensor(float16)": np.float16, "tensor(uint8)": np.uint8}
        self._type = types.get(self._input.type, np.float32)

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs, as on the CPU."""
        array = np.ascontiguousarray(x.cpu().numpy().astype(self._type, copy=False))
        return [torch.from_numpy(y) for y in self._session.run(None, {self._input.name: array})]


class OpenVinoSession:
    """OpenVINO on a CPU, reading an ONNX file."""

    engine = "openvino"

    def __init__(self, file: Path, device: str | torch.device) -> None:
        if device != "auto" and resolve_device(device).type != "cpu":
            raise UserError(f"device {device}: OpenVINO runs on a CPU: leave it out")
        try:
            import openvino
        except ImportError:
            raise UserError("engine openvino is not installed: pip install openvino") from None
        core = openvino.Core()
        try:
            model = core.read_model(str(file))
        except RuntimeError as error:
            raise _unreadable(str(file), "an ONNX file", error) from None
        shape = model.inputs[0].partial_shape
        self.shape = [d.get_length() if d.is_static else None for d in shape]
        rt_info = model.rt_info["framework"] if "framework" in model.rt_info else {}  # noqa: SIM401  # no dict
        self.metadata = {key: str(value.value) for key, value in rt_info.items()}
        # by default it computes in bf16 where the processor can
        self._model = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        self._type = model.inputs[0].element_type.to_dtype()

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The outputs, as on the CPU."""
        result = self._model(x.cpu().numpy().astype(self._type, copy=False))
        return [torch.from_numpy(np.array(result[port])) for port in self._model.outputs]


class Pt2Session:
    """An exported program in eager PyTorch, or a compiled one (AOTInductor)."""

    def __init__(self, file: Path, metadata: Metadata) -> None:
        self.engine = metadata.kind
        try:
            if metadata.kind == "aoti":
                self._forward: Callable[[Tensor], Tensor] = torch._inductor.aoti_load_package(file)
            else:
                self._forward = torch.export.load(file).module()
        except Exception as error:  # damage shows in many ways
            raise _unreadable(str(file), "a .pt2 file that this PyTorch reads", error) from None

    def __call__(self, x: Tensor) -> list[Tensor]:
        """The output, on the device of the file."""
        return [self._forward(x)]


def read_pt2_metadata(path: Path) -> Metadata:
    """Metadata of a .pt2, read without loading anything of it.

    Raises:
        UserError: The file is damaged, or not ours.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = [n for n in archive.namelist() if n.endswith(f"/extra/{PT2_ENTRY}")]
            if not entries:
                return Metadata.from_text({}, path)
            return Metadata.from_text(json.loads(archive.read(entries[0])), path)
    except (zipfile.BadZipFile, json.JSONDecodeError, OSError) as error:
        raise _unreadable(str(path), "a .pt2 file", error) from None


class ExportedNetwork:
    """Decoded predictions of an exported file.

    Args:
        path: Of the .onnx or .pt2 file.
        device: "auto", "cpu", "cuda", "cuda:N"; a .pt2 runs where it was exported for, on CUDA
            on the first GPU, and OpenVINO on a CPU.
        engine: "auto", or "openvino" for an .onnx file.
        names: Class names of an ONNX file that is not ours.
        layout: Its output's layout, "grid" or "classes-first".

    Attributes:
        metadata: What the file says of itself.
        names: Class names by number.
        stride: The model's, pixels.
        imgsz: (height, width) of its input, pixels; it takes no other.
        device: Where the input is taken.
        dtype: Of the input.
        precision: Of weights and convolutions, "fp32" or "fp16".
        engine: "onnxruntime", "onnxruntime-cuda", "openvino", "torch-export" or "aoti".
        title: Variant and kind, in words.
        one_shape: True: the size of the input is fixed.

    Raises:
        UserError: The file is missing, damaged or not ours, what runs it is not installed, or the
            device is not to be had.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        device: str | torch.device = "auto",
        engine: str = "auto",
        names: Sequence[str] | None = None,
        layout: str | None = None,
    ) -> None:
        path = Path(path)
        if not path.is_file():
            raise UserError(f"{path}: no such file: check the path")
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self._session: OnnxSession | OpenVinoSession | Pt2Session
        if path.suffix == ".pt2":
            if engine != "auto" or names or layout:
                raise UserError(f"{path}: a .pt2 takes no --engine, --names or --layout")
            self.metadata = read_pt2_metadata(path)
            self.device = _pt2_device(path, self.metadata, device)
            self._session = Pt2Session(path, self.metadata)
        else:
            if engine not in ("auto", "openvino"):
                raise UserError(f"engine {engine} does not run .onnx files: use auto or openvino")
            kind = OpenVinoSession if engine == "openvino" else OnnxSession
            session = kind(path, device)
            self.metadata = _onnx_metadata(session, path, names, layout)
            self._session = session
        self.names, self.stride = self.metadata.names, self.metadata.stride
        self.imgsz, self.one_shape = self.metadata.imgsz, True
        self.precision: str = self.metadata.precision
        self.title = f"{self.metadata.variant}, exported as {self.metadata.kind}"
        self.engine = self._session.engine
        self._path = path

    def check_wishes(
        self, *, variant: str | None, precision: str, imgsz: int | tuple[int, int] | None
    ) -> None:
        """Refuse, with a UserError, what was decided when the file was exported."""
        height, width = self.imgsz
        meta = self.metadata
        if variant is not None:
            raise UserError(f"{self._path}: is a {meta.variant}: leave the variant out")
        if precision not in ("auto", meta.precision):
            raise UserError(f"{self._path}: is {meta.precision}: export it with {precision}")
        if imgsz is not None and imgsz != (height, width) and (imgsz, imgsz) != (height, width):
            raise UserError(
                f"{self._path}: takes {height} x {width} pixels only: leave imgsz out, or "
                "export it again"
            )

    @torch.inference_mode()
    def __call__(self, x: Tensor) -> Tensor:
        """Decoded boxes [B, N, 5 + classes] in fp32 of images x [B, 3, H, W], RGB in 0..1.

        From a file that suppresses by itself, N is its `max_det`, with rows of zeros beyond those
        that it found; suppressing these again changes nothing.
        """
        if tuple(x.shape[2:]) != self.imgsz:
            height, width = self.imgsz
            raise UserError(f"{self._path}: takes images of {height} x {width} pixels only")
        meta = self.metadata
        x = x.to(self.device, self.dtype)
        if meta.letterbox:
            pixels = (x * 255).round().to(torch.uint8).flip(1).permute(0, 2, 3, 1)
            found = [self._session(image.contiguous()) for image in pixels]
            return torch.cat([self._decoded(outputs[0]) for outputs in found])
        if meta.batch == "dynamic":
            return self._decoded(self._session(x.contiguous())[0])
        decoded = []
        for part in torch.split(x, meta.batch):
            empty = part.new_zeros(meta.batch - len(part), *part.shape[1:])
            outputs = self._session(torch.cat([part, empty]) if len(empty) else part.contiguous())
            decoded.append(self._decoded(outputs[0])[: len(part)])
        return torch.cat(decoded)

    def _decoded(self, output: Tensor) -> Tensor:
        """The first output in the layout "grid"."""
        output, classes, layout = output.float(), len(self.names), self.metadata.layout
        width = {"grid": 5 + classes, "classes-first": 4 + classes, "detections": 6}[layout]
        axis = 1 if layout == "classes-first" else 2
        if output.ndim != 3 or output.shape[axis] != width:
            raise UserError(
                f"{self._path}: its output {list(output.shape)} is not of layout {layout} "
                f"with {classes} classes: give the right --layout and --names"
            )
        if layout == "grid":
            return output
        if layout == "classes-first":
            output = output.transpose(1, 2)
            return _grid(output[..., :4], output[..., 4:])
        corners, label = output[..., :4], output[..., 5].long()
        scores = torch.nn.functional.one_hot(label, classes) * output[..., 4:5]
        size = corners[..., 2:] - corners[..., :2]
        return _grid(torch.cat((corners[..., :2] + size / 2, size), -1), scores)


def _grid(boxes: Tensor, scores: Tensor) -> Tensor:
    """[B, N, 5 + nc] of boxes and scores [B, N, nc] = objectness x class."""
    objectness = scores.amax(-1, keepdim=True)
    # With one class the score is the objectness alone; with more, classes share a whole one.
    one = torch.ones_like(objectness)
    parts = (objectness, one) if scores.shape[-1] == 1 else (one, scores)
    return torch.cat((boxes, *parts), -1)


def _onnx_metadata(
    session: OnnxSession | OpenVinoSession,
    path: Path,
    names: Sequence[str] | None,
    layout: str | None,
) -> Metadata:
    known = _parse(session.metadata)
    if known.get("format"):
        if names or layout:
            raise UserError(f"{path}: knows its names and layout: leave --names and --layout out")
        return Metadata.from_text(session.metadata, path)
    if not names or not layout:
        lacks = [field.name for field in fields(Metadata) if field.name not in known]
        raise UserError(
            f"{path}: not written by `yolov7 export` (its metadata lacks {', '.join(lacks)}): "
            "give --names and --layout"
        )
    if layout not in ("grid", "classes-first"):
        raise UserError(f"layout {layout}: give grid or classes-first")
    if len(session.shape) != 4 or None in session.shape[1:] or session.shape[1] != 3:
        shape = " x ".join("?" if d is None else str(d) for d in session.shape)
        raise UserError(f"{path}: its input is {shape}: export it with images of one fixed size")
    batch, _, height, width = session.shape
    assert height is not None
    assert width is not None
    return Metadata(
        format="",
        kind="onnx",
        variant="unknown",
        names=list(names),
        stride=32,
        imgsz=(height, width),
        batch="dynamic" if batch is None else batch,
        precision="fp32",
        layout="grid" if layout == "grid" else "classes-first",
        letterbox=False,
        nms=None,
        device="cpu",
        version="",
    )


def _pt2_device(path: Path, metadata: Metadata, wanted: str | torch.device) -> torch.device:
    device = torch.device(metadata.device)
    chosen = device if wanted == "auto" else resolve_device(wanted)
    if chosen.type != device.type:
        raise UserError(f"{path}: was exported for {device}: export it with --device {chosen.type}")
    if chosen.index:
        raise UserError(f"{path}: runs on the first GPU: choose it with CUDA_VISIBLE_DEVICES")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"{path}: was exported for cuda, and there is no GPU here")
    return device


def _name(file: Path | bytes) -> str:
    return "the graph" if isinstance(file, bytes) else str(file)


def _unreadable(name: str, what: str, error: Exception) -> UserError:
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return UserError(f"{name}: truncated, or not {what} ({reason[:120]})")
