"""Hyper-parameters: typed, frozen, one preset per family of variants."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from yolov7.errors import UserError
from yolov7.variants import Variant

PresetName = Literal["p5", "p6", "tiny", "custom"]
# What is a probability or a share: at most 1.
SHARES = {
    *("hsv_h", "hsv_s", "hsv_v", "scale", "flipud", "fliplr", "mosaic", "mosaic9", "mixup"),
    *("copy_paste", "paste_in", "momentum", "warmup_momentum", "label_smoothing"),
}


@dataclass(frozen=True)
class Augmentation:
    """How strongly training images are changed.

    Args:
        hsv_h, hsv_s, hsv_v: largest relative change of hue, saturation, value.
        degrees, shear: largest rotation and shear, degrees.
        perspective: largest perspective coefficient, per pixel.
        translate: largest shift, fraction of the image.
        scale: images are scaled by 1 - scale to 1.1 + scale.
        flipud, fliplr: probability of a flip.
        mosaic: probability of a mosaic.
        mosaic9: share of mosaics made of nine images instead of four.
        mixup: probability of blending a mosaic with another.
        copy_paste: share of the outlined objects of a mosaic copied to their mirrored place.
        paste_in: probability of pasting outlined objects of other images.
    """

    hsv_h: float = 0.015
    hsv_s: float = 0.7
    hsv_v: float = 0.4
    degrees: float = 0.0
    shear: float = 0.0
    perspective: float = 0.0
    translate: float = 0.2
    scale: float = 0.9
    flipud: float = 0.0
    fliplr: float = 0.5
    mosaic: float = 1.0
    mosaic9: float = 0.2
    mixup: float = 0.15
    copy_paste: float = 0.0
    paste_in: float = 0.15


@dataclass(frozen=True)
class HyperParameters:
    """What a training run is tuned by; the defaults are those of P5 on COCO.

    Args:
        lr0: learning rate after the warm-up, for a nominal batch of 64.
        lrf: the last epoch's learning rate over lr0.
        momentum: of SGD; Adam's first beta.
        weight_decay: on convolution weights, for a batch of 64.
        warmup_epochs: length of the warm-up; None: the authors' 3 epochs and at least 1000 batches
            where the run is longer than 10,000, else a tenth of it.
        warmup_momentum, warmup_bias_lr: where the warm-up starts.
        box, cls, obj: gains of the loss terms for 640 pixels, 80 classes, three levels.
        label_smoothing: positives are 1 - e/2, negatives e/2.
        augmentation: of the images.
    """

    lr0: float = 0.01
    lrf: float = 0.1
    momentum: float = 0.937
    weight_decay: float = 5e-4
    warmup_epochs: float | None = None
    warmup_momentum: float = 0.8
    warmup_bias_lr: float = 0.1
    box: float = 0.05
    cls: float = 0.3
    obj: float = 0.7
    label_smoothing: float = 0.0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def with_values(self, values: Mapping[str, float]) -> "HyperParameters":
        """A copy with some numbers replaced, by the names of the fields of both classes.

        Raises:
            UserError: an unknown name, a number below 0, a share over 1.
        """
        own = {f.name for f in fields(self)} - {"augmentation"}
        images = {f.name for f in fields(Augmentation)}
        unknown = sorted(set(values) - own - images)
        if unknown:
            raise UserError(
                f"unknown hyper-parameter {unknown[0]!r}: choose from "
                f"{', '.join(sorted(own | images))}"
            )
        for name, value in values.items():
            if not value >= 0:  # nor NaN
                raise UserError(f"hyper-parameter {name} {value:g}: give 0 or more")
            if name in SHARES and value > 1:
                raise UserError(f"hyper-parameter {name} {value:g}: give 0 to 1")
        augmentation: dict[str, Any] = {k: v for k, v in values.items() if k in images}
        rest: dict[str, Any] = {k: v for k, v in values.items() if k in own}
        return replace(self, augmentation=replace(self.augmentation, **augmentation), **rest)


PRESETS: dict[PresetName, HyperParameters] = {
    "p5": HyperParameters(),
    "p6": HyperParameters(lrf=0.2),
    "tiny": HyperParameters(
        lrf=0.01,
        cls=0.5,
        obj=1.0,
        augmentation=Augmentation(translate=0.1, scale=0.5, mixup=0.05, paste_in=0.05),
    ),
    "custom": HyperParameters(augmentation=Augmentation(scale=0.5, mixup=0.0, paste_in=0.0)),
}


def preset_name(variant: Variant) -> PresetName:
    """The preset that a variant was published with."""
    if variant.spp == "tiny":
        return "tiny"
    return "p6" if len(variant.levels) == 4 else "p5"
