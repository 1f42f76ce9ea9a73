"""Weights in and out: the authors' pickles, state dicts under their names, our safetensors.

The authors' tensors are matched to ours by position: both list their layers in registration order.
The permissive weights of the base model (MultimediaTechLab/YOLO, LibreYOLO) have other names for
the same layers, and another graph, which they load into.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from importlib.resources import as_file, files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from yolov7 import __version__
from yolov7.atomic import atomic
from yolov7.errors import UserError
from yolov7.model import Form, YOLOv7
from yolov7.schema import from_json
from yolov7.text import one_line
from yolov7.unpickle import Record, StoredTensor, TorchFile, module_tensors
from yolov7.variants import LARGEST_IMGSZ, V7_MIT, VARIANTS, Variant, named

DEMO_WEIGHTS = "blood-cells-tiny.safetensors"  # embedded; used when no weights are named
DEMO = "blood-cells"  # their name
MIT_GRAPH = (
    "weights of MultimediaTechLab/YOLO or LibreYOLO (MIT): they run in their own graph, which "
    "is not the paper's; --variant yolov7 takes the paper's (compare the two with yolov7 val)"
)
_FORMAT = "yolov7-triton/2"
_KEY = "yolov7"  # of our metadata among the file's
_LONGEST = 1 << 24  # characters of our metadata; a thousand classes take a thousandth of it


def load_model(weights: str | Path | None = None, *, variant: str | None = None) -> YOLOv7:
    """A model with trained weights, in fp32 and evaluation mode, not fused.

    Args:
        weights: our .safetensors, the authors' .pt, a state dict under their names, or the name of
            a published file ("yolov7.pt"), which is downloaded on first use. "blood-cells", or
            None: the embedded demo weights.
        variant: a key of `VARIANTS`; None recognises it from the tensors. Needed only for
            a state dict of `yolov7-tiny-silu`, whose tensors are those of `yolov7-tiny`.

    Raises:
        UserError: the file is missing, damaged, hostile, or of another architecture.
    """
    if variant is not None:
        named(variant)
    if weights is None or (str(weights) == DEMO and not Path(weights).is_file()):
        with as_file(files("yolov7.assets") / DEMO_WEIGHTS) as path:
            return _load_safetensors(path)
    path = Path(weights)
    if not path.exists():
        from yolov7.download import PUBLISHED, published_weights  # not to be waited for else

        name = str(weights)
        if name not in PUBLISHED:
            names = ", ".join(PUBLISHED)
            raise UserError(f"{path}: no such weights file; published names are {names}")
        variant = variant or PUBLISHED[name]
        path = published_weights(name, lambda part: _load_torch(part, PUBLISHED[name]))
    if not path.is_file():
        raise UserError(f"{path}: is no file: name the file with the weights")
    if path.suffix == ".safetensors":
        return _load_safetensors(path)
    return _load_torch(path, variant)


def in_words(weights: object) -> str:
    """What weights were named, for people."""
    return str(weights) if weights else f"embedded demo weights {DEMO_WEIGHTS}"


def save_model(model: YOLOv7, path: str | Path, **metadata: Any) -> None:
    """Write `model` in our format, replacing `path` only when everything is on the disk.

    Args:
        model: in any form and floating-point type.
        path: of the .safetensors file.
        metadata: JSON values to keep beside the tensors, such as the training arguments.

    Raises:
        UserError: the file cannot be written, or it could not be loaded: a tensor holds NaN or
            infinity, such as fp16 makes of a number beyond 65504, or the tensors are not those of
            the model's `variant` and `form`.
    """
    path = Path(path)
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    try:
        header = Header(
            spec=model.variant,
            form=model.form,
            names=model.names,
            imgsz=model.imgsz,
            ranges=model.ranges,
        )
        text = json.dumps({"format": _FORMAT, **metadata, **asdict(header)})
        _described(_header(json.loads(text)), tensors)
    except ValueError as error:
        raise UserError(f"{path}: not written, as nothing could load it: {error}") from None
    if (name := _not_finite(model)) is not None:
        half = tensors[name].dtype == torch.float16
        remedy = ", perhaps too large for fp16: use --precision fp32" if half else ""
        raise UserError(f"{path}: tensor {name} holds NaN or infinity{remedy}")
    with atomic(path) as temporary:
        temporary.write_bytes(save(tensors, metadata={_KEY: text}))


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save_model` wrote.

    Raises:
        UserError: the file is damaged or not in our format.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_KEY, "")
    except SafetensorError as error:
        raise UserError(
            f"{path}: truncated or not a safetensors file ({one_line(error)})"
        ) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    try:
        if len(text) > _LONGEST:
            raise ValueError(f"{len(text)} characters of it")
        metadata = dict(json.loads(text))
        written = metadata["format"]
    except (KeyError, TypeError, ValueError, RecursionError):
        raise UserError(
            f"{path}: no yolov7 metadata; write it with `yolov7 convert` or `save_model`"
        ) from None
    if written != _FORMAT:
        raise UserError(f"{path}: of format {one_line(written)}; this version reads {_FORMAT}")
    return metadata


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a file in our format says of its model; other metadata is for people and tools.

    Attributes:
        spec: The architecture itself. Its name is for people: the file loads where no variant of
            that name is known.
        form: Of the tensors.
        names: Class names by number.
        imgsz: Side in pixels that the model is meant for.
        ranges: Of the maps, by precision, from calibration.
        version: Of this package, when it wrote the file.
    """

    spec: Variant
    form: Form
    names: list[str]
    imgsz: int
    ranges: dict[str, dict[str, float]]
    version: str = __version__

    def __post_init__(self) -> None:
        if not 1 <= self.imgsz <= LARGEST_IMGSZ:
            raise ValueError(f"imgsz is {self.imgsz}, not 1 to {LARGEST_IMGSZ} pixels")


def _header(metadata: Mapping[str, Any]) -> Header:
    known = [field.name for field in fields(Header)]
    return from_json(Header, {name: metadata[name] for name in known if name in metadata})


def _load_safetensors(path: Path) -> YOLOv7:
    metadata = read_metadata(path)
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no dict
        return _filled(_described(_header(metadata), tensors), _copied(tensors))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except Exception as error:  # tensors can be of any shape, type and number
        what = one_line(str(error))
        raise UserError(f"{path}: its tensors do not fit its metadata ({what})") from None


def _described(header: Header, tensors: Mapping[str, Tensor]) -> YOLOv7:
    """The empty model that the header describes.

    Raises:
        ValueError: The tensors have other names or shapes.
    """
    spec = header.spec
    # Counted before they are built: any depth can be stated in a few bytes.
    elans = spec.parallel * (len(spec.backbone) + 2 * len(spec.levels) - 2)
    layers = len(spec.stem) + elans * (2 + 2 * spec.pairs)
    if layers > len(tensors):
        raise ValueError(f"{len(tensors)} tensors for {layers} convolutions")
    model = _empty(spec, len(header.names), header.form)
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    wrong = shapes.items() ^ {(name, tensor.shape) for name, tensor in tensors.items()}
    if wrong:
        raise ValueError(f"tensor {min(name for name, _ in wrong)} differs")
    model.names, model.imgsz, model.ranges = header.names, header.imgsz, header.ranges
    return model


def _empty(spec: Variant, num_classes: int, form: Form) -> YOLOv7:
    """A model without memory, to be given its tensors."""
    with torch.device("meta"):
        model = YOLOv7(spec, num_classes, "deploy" if form == "fused" else form)
        return model.fuse() if form == "fused" else model


def _filled(model: YOLOv7, tensors: Mapping[str, Tensor]) -> YOLOv7:
    """`model` with its tensors, in fp32 and evaluation mode."""
    model.load_state_dict(tensors, assign=True)
    if (name := _not_finite(model.float())) is not None:
        raise UserError(f"tensor {name} holds NaN or infinity")
    return model.eval()


def _copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors in fp32, in memory of their own: the file may be overwritten from now on."""
    return {
        name: tensor.to(torch.float32 if tensor.is_floating_point() else tensor.dtype, copy=True)
        for name, tensor in tensors.items()
    }


def _not_finite(model: YOLOv7) -> str | None:
    """The first tensor with NaN or infinity in it."""
    state = model.state_dict().items()
    return next((n for n, t in state if t.is_floating_point() and not t.isfinite().all()), None)


@dataclass(frozen=True)
class _Official:
    """What an authors' file holds."""

    tensors: dict[str, StoredTensor]
    activations: frozenset[str] = frozenset()  # class names of the pickled activations
    names: list[str] = field(default_factory=list)
    mit: bool = False  # of MultimediaTechLab/YOLO or LibreYOLO: the graph is theirs


def _load_torch(path: Path, variant: str | None) -> YOLOv7:
    with TorchFile(path) as file:
        try:
            official = _official(file.root)
            return _build(official, variant)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
        except Exception as error:  # a storage cut short, a state that is no state
            what = one_line(f"{type(error).__name__}: {error}")
            raise UserError(f"{path}: damaged ({what})") from None


def _official(root: Any) -> _Official:
    """Find the model: `ema` before `model`, a bare module, or a state dict."""
    if isinstance(root, Record):
        module: Any = root
    else:
        if not isinstance(root, dict):
            raise UserError(f"holds a {type(root).__name__}, not a model")
        module = next((root[k] for k in ("ema", "model") if root.get(k) is not None), root)
    if isinstance(module, Record):
        tensors, modules = module_tensors(module)
        names = module.get("names")
        if isinstance(names, dict):
            names = list(names.values())
        if not isinstance(names, list):
            names = []
        return _Official(
            tensors,
            frozenset(m.origin.rpartition(".")[2] for m in modules),
            # Containers would be endless text where their items share items.
            [str(n) for n in names if isinstance(n, str | int | float)],
        )
    state = module.get("state_dict", module)
    tensors = {k: t for k, t in state.items() if isinstance(t, StoredTensor)}
    if _is_mit(tensors):
        return _Official(
            {_authors_name(name): tensor for name, tensor in tensors.items()}, mit=True
        )
    return _Official(tensors)


# The parts of a layer as MultimediaTechLab/YOLO calls them, and as the authors do.
_MIT_PARTS = (
    (r"\.pre_conv\.0\.", ".cv1."), (r"\.pre_conv\.1\.", ".cv3."), (r"\.pre_conv\.2\.", ".cv4."),
    (r"\.post_conv\.0\.", ".cv5."), (r"\.post_conv\.1\.", ".cv6."),
    (r"\.short_conv\.", ".cv2."), (r"\.merge_conv\.", ".cv7."),
    (r"\.conv1\.conv\.", ".rbr_dense.0."), (r"\.conv1\.bn\.", ".rbr_dense.1."),
    (r"\.conv2\.conv\.", ".rbr_1x1.0."), (r"\.conv2\.bn\.", ".rbr_1x1.1."),
    (r"\.heads\.(\d+)\.head_conv\.", r".m.\1."),
    (r"\.heads\.(\d+)\.implicit_([am])", r".i\2.\1"),
)  # fmt: skip


def _is_mit(tensors: Mapping[str, StoredTensor]) -> bool:
    return any(re.search(r"\.heads\.\d+\.head_conv\.", name) for name in tensors)


def _authors_name(name: str) -> str:
    """What the authors call a tensor that is named as MultimediaTechLab/YOLO names it."""
    layer = re.sub(r"^(model\.)*(layers\.)?", "model.", name)
    for theirs, ours in _MIT_PARTS:
        layer = re.sub(theirs, ours, layer)
    return layer


# The order of the parts of an authors' layer.
_PARTS = (
    *("rbr_dense", "rbr_1x1", "cv1", "cv2", "cv3", "cv4", "cv5", "cv6", "cv7", "conv", "bn"),
    *("m", "m2", "ia", "im"),
    *("weight", "bias", "running_mean", "running_var", "num_batches_tracked", "implicit"),
)
_RANK = {part: rank for rank, part in enumerate(_PARTS)}


def _registration_order(name: str) -> tuple[int, ...]:
    """Sort key that puts official names, model.LAYER.PART..., in registration order."""
    if not re.fullmatch(r"(module\.)?model\.\d+\.[\w.]+", name):
        raise UserError(f"tensor {name!r:.80} is not named as the authors name theirs (model.0...)")
    parts = name.removeprefix("module.").split(".")[1:]
    return tuple(int(p) if p.isdigit() else _RANK.get(p, len(_RANK)) for p in parts)


def _build(official: _Official, variant: str | None) -> YOLOv7:
    order = sorted(official.tensors, key=_registration_order)
    weights = [official.tensors[n] for n in order if "anchor" not in n]
    if not weights:
        raise UserError("holds no tensors of a model")
    outputs = [official.tensors[n].shape[0] for n in order if re.search(r"\.m\.0\.bias$", n)]
    num_classes = outputs[0] // 3 - 5 if outputs else 0
    if num_classes < 1 or outputs[0] % 3:
        raise UserError("its last layer is not the detection head of a YOLOv7")
    if official.mit and variant is None:
        warnings.warn(MIT_GRAPH, stacklevel=2)
        candidates = [V7_MIT]
    else:
        candidates = [VARIANTS[variant]] if variant else list(VARIANTS.values())
    model = _recognise(weights, num_classes, candidates, variant, official.activations)
    state = model.state_dict()
    names = [n for n in state if n != "head.anchors"]
    loaded = {n: t.load() for n, t in zip(names, weights, strict=True)}
    loaded["head.anchors"] = _anchors(official.tensors, model)
    if len(official.names) == num_classes:
        model.names = official.names
    return _filled(model, loaded)


def _recognise(
    weights: Sequence[StoredTensor],
    num_classes: int,
    candidates: Sequence[Variant],
    variant: str | None,
    activations: frozenset[str],
) -> YOLOv7:
    """The empty model whose tensors have exactly these shapes; `variant` is what was asked for."""
    shapes = [t.shape for t in weights]
    forms: tuple[Form, ...] = ("training", "deploy")
    for spec in candidates:
        if shapes[0][0] != spec.stem[0][0]:
            continue
        for form in forms:
            # What grows with the number of classes is built for a trunk of the family only.
            trunk = [s for n, s in _shapes(_empty(spec, 1, form)) if not n.startswith("head.")]
            if shapes[: len(trunk)] != trunk:
                continue
            model = _empty(spec, num_classes, form)
            if [s for _, s in _shapes(model)] == shapes:
                silu_tiny = spec.name == "yolov7-tiny" and not variant and "SiLU" in activations
                if silu_tiny and "LeakyReLU" not in activations:
                    return _empty(VARIANTS["yolov7-tiny-silu"], num_classes, form)
                return model
    wanted = variant or "any YOLOv7 variant"
    raise UserError(
        f"its {len(shapes)} tensors (first: {list(shapes[0])}) are not those of {wanted}; "
        "weights of another architecture cannot be used"
    )


def _shapes(model: YOLOv7) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the tensors that are matched by position: all but the anchors."""
    return [(n, tuple(t.shape)) for n, t in model.state_dict().items() if n != "head.anchors"]


def _anchors(tensors: Mapping[str, StoredTensor], model: YOLOv7) -> Tensor:
    """Anchors in pixels, [levels, anchors, 2]: the file's, else the variant's."""
    strides = torch.tensor(model.head.strides, dtype=torch.float32).view(-1, 1, 1)
    stored = {name.rpartition(".")[2]: tensor for name, tensor in tensors.items()}
    if "anchor_grid" in stored:
        return stored["anchor_grid"].load().float().view(len(strides), -1, 2)
    if "anchors" in stored:
        return stored["anchors"].load().float().view(len(strides), -1, 2) * strides
    return torch.tensor(model.variant.anchors, dtype=torch.float32).view(len(strides), -1, 2)
