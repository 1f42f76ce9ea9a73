"""What a training run can be told; the command line is made of it."""

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from yolov7.errors import UserError
from yolov7.train.config import PRESETS, HyperParameters, PresetName, preset_name
from yolov7.train.images import CacheKind
from yolov7.train.norm import KernelsName
from yolov7.train.optimizer import OptimizerName
from yolov7.variants import Downsample, Variant

EPOCHS = 300  # where nothing is said
# The least and the most that a number may be; what else it has to fit is checked where it is used.
LEAST = {
    "imgsz": 1,
    "epochs": 1,
    "batch": 0,
    "clip": 0,
    "patience": 1,
    "hours": 0,
    "val_every": 1,
    "save_every": 1,
    "accumulate": 1,
    "no_mosaic_epochs": 0,
    "fraction": 0,
    "workers": 0,
    "seed": 0,
}
MOST = {"seed": 2**63 - 1, "fraction": 1}  # PyTorch's generators take no larger seed
GEOMETRY = ("degrees", "shear", "perspective", "translate", "scale", "mosaic")
# What may be given to a run that is resumed.
ANEW = (
    *(
        "data",
        "epochs",
        "patience",
        "hours",
        "val_every",
        "save_every",
        "val_engine",
        "workers",
        "cache",
    ),
    *("device", "kernels", "export"),
)


@dataclass(kw_only=True)
class Train:
    """Train a model on labelled images; under torchrun, on several devices."""

    data: str = ""
    """data.yaml, a folder that holds one, a COCO json, or coco"""
    weights: str | None = None
    """start from these weights in training form (default: from scratch)"""
    variant: str | None = None
    """what to train from scratch, or what bare weights are (default: yolov7-tiny)"""
    depth: float = 1.0
    """compound scale of the variant's depth, from scratch"""
    width: float = 1.0
    """compound scale of the variant's width, from scratch"""
    downsample: Downsample | None = None
    """form of the strided layers, from scratch (default: the variant's)"""
    multiplier: float = 1.0
    """plain factor on the channels of every convolution, from scratch"""
    split: str = "train"
    """split to train on"""
    val_split: str = "val"
    """split to evaluate on"""
    val_fraction: float | None = None
    """share of the split to train on that is held out and evaluated on, instead of --val-split"""
    strict: bool = False
    """stop where an image or label is wrong, instead of leaving it out"""
    fraction: float = 1.0
    """share of the images to train on, drawn by the seed"""
    single_class: bool = False
    """all classes are one, called object"""
    imgsz: int | None = None
    """side of the images in pixels, rounded up to the stride (default: the model's)"""
    epochs: int | None = None
    """passes over the images (default: 300, or those of the resumed run)"""
    batch: int = 16
    """images per step, on all devices together; 0: what the memory of the device holds"""
    preset: PresetName | Literal["auto"] = "auto"
    """hyper-parameters; auto: custom with weights, else those the variant was published with"""
    set: dict[str, float] = field(default_factory=dict)
    """hyper-parameters over the preset's, as NAME VALUE pairs"""
    optimizer: OptimizerName = "sgd"
    """sgd: Nesterov momentum; adam and adamw want a lower rate, such as --set lr0 0.001"""
    accumulate: int | None = None
    """batches whose gradients are summed for a step (default: as many as make 64 images, or 16 in a
    run of up to 10,000 batches)"""
    linear_lr: bool = False
    """a linear schedule instead of a cosine"""
    plain_loss: bool = False
    """every candidate is a match; heads without auxiliary outputs only"""
    no_mosaic_epochs: int = 0
    """last epochs, whose images are no mosaics"""
    clip: float = 0.0
    """largest norm of the gradients; 0: no limit"""
    freeze: tuple[str, ...] = ()
    """parts of the network that stay as they are, such as stem backbone.0"""
    autoanchor: bool = True
    """leave the anchors as they are, even where fewer than 98 % of the boxes match one"""
    image_weights: bool = False
    """draw images of rare and badly detected classes more often"""
    multi_scale: bool = False
    """stretch every batch by 0.5 to 1.5"""
    rect: bool = False
    """batches of images of like aspect, without mosaic and other changes of geometry than flips"""
    cache: CacheKind = "none"
    """where scaled images are kept: none, ram, or disk (the user's cache folder)"""
    sync_bn: bool = False
    """batch norm statistics over all devices"""
    patience: int | None = None
    """stop after so many epochs without a better model (default: never)"""
    hours: float | None = None
    """stop after the epoch in which so many hours have passed (default: no limit)"""
    save_every: int | None = None
    """epochs between weights that are kept beside last and best (default: none are)"""
    val_every: int = 1
    """epochs between evaluations; the last epoch is always evaluated"""
    val_engine: Literal["auto", "eager", "compile", "graph"] = "eager"
    """what runs the network in evaluations, as in yolov7 val"""
    export: str | None = None
    """format, as in yolov7 export, to write the best weights in at the end (default: none)"""
    workers: int | None = None
    """processes that prepare images (default: one per core, at most 8)"""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N; a resumed run keeps its own"""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """arithmetic of the network; auto: bf16 on CUDA, fp32 on a CPU"""
    kernels: KernelsName = "auto"
    """batch norm and activation by our kernels; auto: on CUDA, if they agree with PyTorch there"""
    seed: int = 0
    """of everything random"""
    project: str = "runs/train"
    """folder of the runs"""
    name: str | None = None
    """name of the run (default: the next free number)"""
    resume: str | None = None
    """folder of a run to go on with, or to make what is missing of its end; data (where it has
    moved), epochs, patience, hours, val-every, save-every, val-engine, export, workers, cache,
    device and kernels may be given anew; on several machines, all of them have to see the
    folder"""
    json: str | None = None
    """write the result to this file"""


def check_numbers(options: Train) -> None:
    """Refuse numbers that make no sense, before anything is read.

    Raises:
        UserError: there is one.
    """
    for name, least in LEAST.items():
        value, most = getattr(options, name), MOST.get(name)
        option = f"--{name.replace('_', '-')} {value}"
        if value is not None and not value >= least:  # nor NaN
            raise UserError(f"{option}: give {least} or more")
        if value is not None and most is not None and value > most:
            raise UserError(f"{option}: give {most} or less")


def hyper_parameters(options: Train, variant: Variant) -> HyperParameters:
    """The preset with the user's changes."""
    name = options.preset
    if name == "auto":
        name = "custom" if options.weights else preset_name(variant)
    hyper = PRESETS[name].with_values(options.set)
    return hyper.with_values(dict.fromkeys(GEOMETRY, 0.0)) if options.rect else hyper


def given_anew(
    given: Train, saved: Mapping[str, Any], allowed: Collection[str], what: str, instead: str
) -> dict[str, Any]:
    """The options that are given beside --resume and differ from what was saved, by name.

    Args:
        given: all that are given.
        saved: those that were saved.
        allowed: which may differ.
        what: began with what was saved.
        instead: to begin, with other options.

    Raises:
        UserError: another one differs.
    """
    usual = asdict(Train())
    told = {k: v for k, v in vars(given).items() if k in usual and v != usual[k]}
    anew = {k: v for k, v in told.items() if v != saved.get(k) and k not in ("resume", "json")}
    for name in anew:
        if name not in allowed:
            raise UserError(
                f"--resume goes on as the {what} began, with --{name.replace('_', '-')} "
                f"{saved.get(name)}: leave it out, or begin {instead}"
            )
    return anew


def resumed_options(given: Train, state: dict[str, Any]) -> tuple[Train, str]:
    """The options of the run that is resumed, with those given anew, and what to say of these.

    Raises:
        UserError: the run began with another value of an option that cannot change.
    """
    usual = asdict(Train())
    saved = {k: v for k, v in state["options"].items() if k in usual}
    saved["freeze"] = tuple(saved["freeze"])
    instead = f"a new run with --weights {given.resume}/weights/last.safetensors"
    anew = given_anew(given, saved, ANEW, "run", instead)
    options = Train(**saved | anew | {"resume": given.resume, "json": given.json})
    check_numbers(options)
    done = state["progress"]["epoch"]
    changes = [f"--{k.replace('_', '-')} {v} instead of {saved.get(k)}" for k, v in anew.items()]
    return options, f"resumed after epoch {done}" + (f", {', '.join(changes)}" if changes else "")
