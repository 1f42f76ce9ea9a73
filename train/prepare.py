"""What a run is made of, from its options: model, data, hyper-parameters."""

import os
from dataclasses import fields
from typing import Any

import numpy as np
import torch

from yolov7.checkpoint import load_model
from yolov7.dataset import Dataset, load_data
from yolov7.engine.choose import resolve_precision
from yolov7.errors import UserError
from yolov7.kernels.runtime import FLOATS
from yolov7.model import YOLOv7, create_model
from yolov7.train.assigner import Anchors
from yolov7.train.autoanchor import MIN_SIDE, better_anchors, box_sizes, possible_recall
from yolov7.train.config import PRESETS, HyperParameters, preset_name
from yolov7.train.loss import Loss, build_loss
from yolov7.train.options import Train

EPOCHS = 300  # where nothing is said
# The least that a number may be; what else it has to fit is checked where it is used.
LEAST = {
    "imgsz": 1,
    "epochs": 1,
    "batch": 0,
    "clip": 0,
    "patience": 1,
    "hours": 0,
    "val_every": 1,
    "workers": 0,
    "seed": 0,
}
GEOMETRY = ("degrees", "shear", "perspective", "translate", "scale", "mosaic")


def check_numbers(options: Train) -> None:
    """Refuse numbers that make no sense, before anything is read.

    Raises:
        UserError: there is one.
    """
    for name, least in LEAST.items():
        value = getattr(options, name)
        if value is not None and not value >= least:  # nor NaN
            raise UserError(f"--{name.replace('_', '-')} {value:g}: give {least} or more")


def read_data(options: Train) -> tuple[Dataset, Dataset]:
    """The splits to train and to evaluate on.

    Raises:
        UserError: a split is missing, or there is nothing to learn from.
    """
    if not options.data:
        raise UserError("nothing to train on: give --data, such as a data.yaml or a COCO json")
    train = load_data(options.data, options.split)
    val = load_data(options.data, options.val_split)
    boxes = sum(int((~sample.crowd).sum()) for sample in train.samples)
    if not boxes:
        raise UserError(
            f"{options.data}: the split {options.split} has {len(train.samples)} images but not a "
            "single box: check where the labels lie"
        )
    if train.names != val.names:
        raise UserError(f"{options.data}: the splits name different classes")
    return train, val


def build_model(options: Train, names: list[str]) -> tuple[YOLOv7, list[str]]:
    """The model to train, in training form, and what is to be said about it.

    Raises:
        UserError: weights in deploy form, options that do not fit together.
    """
    torch.manual_seed(options.seed)
    if options.weights is None:
        try:
            model = create_model(
                options.variant or "yolov7-tiny",
                len(names),
                depth=options.depth,
                width=options.width,
                downsample=options.downsample,
                multiplier=options.multiplier,
                names=names,
            )
        except ValueError as error:
            raise UserError(str(error)) from None
        return model, []
    scales = (options.depth, options.width, options.downsample, options.multiplier)
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
    notes = []
    if len(model.names) != len(names):
        notes.append(
            f"{options.weights} knows {len(model.names)} classes, the data {len(names)}: the "
            "detection layers start anew"
        )
        model = with_classes(model, len(names))
    model.names = list(names)
    return model.train(), notes


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


def hyper_parameters(options: Train, model: YOLOv7) -> HyperParameters:
    """The preset with the user's changes."""
    name = options.preset
    if name == "auto":
        name = "custom" if options.weights else preset_name(model.variant)
    hyper = PRESETS[name].with_values(options.set)
    return hyper.with_values(dict.fromkeys(GEOMETRY, 0.0)) if options.rect else hyper


def image_size(options: Train, model: YOLOv7) -> int:
    """The side of the images, checked against the model's stride."""
    size = model.imgsz if options.imgsz is None else options.imgsz
    if size % model.stride:
        near = max(1, round(size / model.stride)) * model.stride
        raise UserError(f"--imgsz {size} is no multiple of the stride {model.stride}: try {near}")
    return size


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


def fit_model_anchors(model: YOLOv7, dataset: Dataset, size: int, seed: int) -> str:
    """Give a model anchors that fit the data, where its own do not; say what was done."""
    boxes = box_sizes(dataset.samples, size)
    if not len(boxes):
        return f"no box has {MIN_SIDE:g} pixels a side: the anchors stay"
    recall, better = better_anchors(boxes, model.head.anchors.numpy(), seed)
    note = f"{recall:.1%} of the boxes match an anchor"
    if better is None:
        return note
    model.head.anchors.copy_(torch.from_numpy(better))
    after = possible_recall(boxes, better.reshape(-1, 2).astype(np.float64))
    return f"{note}: new anchors were fitted, which {after:.1%} match"


def head_loss(
    model: YOLOv7, hyper: HyperParameters, *, plain: bool, lead_only: bool = False
) -> Loss:
    """The loss that fits a model's head, or its lead outputs alone.

    Raises:
        UserError: the plain loss with auxiliary heads.
    """
    auxiliary = len(model.head.auxiliary) > 0 and not lead_only
    if plain and auxiliary:
        raise UserError(f"{model.variant.name} has auxiliary heads: leave out --plain-loss")
    anchors = Anchors(model.head.anchors.detach().cpu().clone(), model.head.strides)
    return build_loss(
        anchors,
        model.head.num_classes,
        auxiliary=auxiliary,
        ota=not plain,
        label_smoothing=hyper.label_smoothing,
    )


def resumed_options(given: Train, state: dict[str, Any]) -> Train:
    """The options of the run that is resumed, with those that are given anew: not the default.

    Raises:
        UserError: it is finished.
    """
    defaults = {f.name: f.default for f in fields(Train)}
    saved = {k: v for k, v in state["options"].items() if k in defaults}
    saved["freeze"] = tuple(saved["freeze"])
    options = Train(**saved)
    for name in ("epochs", "patience", "hours", "workers", "device"):
        if getattr(given, name) != defaults[name]:
            setattr(options, name, getattr(given, name))
    options.resume, options.json = given.resume, given.json
    if state["epoch"] >= (EPOCHS if options.epochs is None else options.epochs):
        raise UserError(
            f"{given.resume} has finished its {state['epoch']} epochs: give more --epochs to go on"
        )
    return options


def training_dtype(precision: str, device: torch.device) -> torch.dtype:
    """What the network computes in; "auto" is bf16 on CUDA and fp32 on a CPU."""
    if precision == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return FLOATS[resolve_precision(precision, device)]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """The context in which the network computes in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def worker_count(options: Train) -> int:
    """Processes that prepare images: one per core, at most 8, shared among a machine's ranks."""
    if options.workers is not None:
        return options.workers
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(8, (os.cpu_count() or 1) // here))
