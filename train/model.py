"""The model that is trained: built or loaded, made to fit the data, parts of it frozen."""

from pathlib import Path

import torch

from yolov7.checkpoint import load_model
from yolov7.errors import UserError
from yolov7.model import YOLOv7, create_model
from yolov7.schema import from_json
from yolov7.train.config import HyperParameters
from yolov7.train.options import Train, hyper_parameters
from yolov7.train.state import State, reading_state


def build_model(options: Train, classes: int) -> YOLOv7:
    """The model that the options name, in training form.

    Raises:
        UserError: weights in deploy form, options that do not fit together.
    """
    torch.manual_seed(options.seed)
    scales = (options.depth, options.width, options.downsample, options.multiplier)
    if options.weights is None:
        try:
            return create_model(
                options.variant or "yolov7-tiny",
                classes,
                depth=options.depth,
                width=options.width,
                downsample=options.downsample,
                multiplier=options.multiplier,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
    if scales != (1.0, 1.0, None, 1.0):
        raise UserError(
            "--depth, --width, --downsample and --multiplier are for training from scratch"
        )
    model = load_model(options.weights, variant=options.variant)
    if model.form != "training":
        raise UserError(
            f"{options.weights} is in {model.form} form, which cannot be trained: its auxiliary "
            "heads or implicit vectors are gone; use the *_training.pt weights, or train "
            f"--variant {model.variant.name} from scratch"
        )
    return model


def fit_classes(model: YOLOv7, names: list[str]) -> tuple[YOLOv7, str]:
    """A model for the classes of the data, and what is to be said about it, if anything."""
    note = ""
    if len(model.names) != len(names):
        note = (
            f"the model knows {len(model.names)} classes, the data {len(names)}: the detection "
            "layers start anew"
        )
        model = with_classes(model, len(names))
    model.names = list(names)
    return model.train(), note


def with_classes(model: YOLOv7, count: int) -> YOLOv7:
    """A copy of a model with another number of classes; its last layers start anew."""
    fresh = YOLOv7(model.variant, count, "training")
    fresh.imgsz = model.imgsz
    state = fresh.state_dict()
    for name, tensor in model.state_dict().items():
        if state[name].shape == tensor.shape:
            state[name] = tensor
    fresh.load_state_dict(state)
    return fresh


def freeze(model: YOLOv7, prefixes: tuple[str, ...]) -> None:
    """Keep parts of a model as they are.

    Raises:
        UserError: a prefix that names no part, or nothing left to train.
    """
    for prefix in prefixes:
        found = [p for n, p in model.named_parameters() if f"{n}.".startswith(f"{prefix}.")]
        if not found:
            parts = ", ".join(name for name, _ in model.named_children())
            raise UserError(f"--freeze {prefix}: no such part of the network: {parts}")
        for parameter in found:
            parameter.requires_grad_(False)
    if not any(p.requires_grad for p in model.parameters()):
        raise UserError("--freeze leaves nothing to train")


def frozen_to_eval(model: YOLOv7, prefixes: tuple[str, ...]) -> None:
    """Batch norms of frozen parts keep their statistics too."""
    for name, module in model.named_modules():
        if any(f"{name}.".startswith(f"{prefix}.") for prefix in prefixes):
            module.eval()


def first_model(options: Train, folder: Path, state: State, classes: int) -> YOLOv7:
    """The model of the options, or of the run that is resumed.

    Args:
        options: of the run.
        folder: of the run that is resumed.
        state: of it; empty for a new run.
        classes: of the data.
    """
    last = folder / "weights" / "last.safetensors"
    return load_model(last) if state else build_model(options, classes)


def fitted_model(
    options: Train, folder: Path, state: State, model: YOLOv7, names: list[str]
) -> tuple[HyperParameters, YOLOv7, str]:
    """Hyper-parameters, and the model with the classes of the data.

    Args:
        options: see `first_model`.
        folder: likewise.
        state: likewise.
        model: to begin with.
        names: classes of the data.

    Returns:
        Both, and what is to be said about the model.

    Raises:
        UserError: the run that is resumed learns other classes, or its state is damaged.
    """
    if state:
        if model.names != names:
            raise UserError(f"{folder} learns {model.names}, the data has {names}")
        with reading_state(folder):
            return from_json(HyperParameters, state["hyper"]), model, ""
    model, note = fit_classes(model, names)
    return hyper_parameters(options, model.variant), model, note
