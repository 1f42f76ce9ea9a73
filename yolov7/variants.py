"""The family: one small frozen spec per variant, and compound scaling as a function on it.

Compound scaling (arXiv 2207.02696, section 3.2) for concatenation-based models: depth multiplies
the pairs of 3x3 convolutions in an ELAN; width multiplies every other convolution, so that the
transition of a block grows with what the concatenation brings it.
"""

import math
from dataclasses import astuple, dataclass, replace
from itertools import chain
from typing import Literal

from yolov7.errors import UserError

Downsample = Literal["conv", "pool", "pool+conv", "downc"]
Taps = Literal["pairs", "all"]

LARGEST_IMGSZ = 4096  # pixels of a side: suppression keeps classes apart up to there

PAIRS = range(2, 2 * 32, 2)  # numbers of a level's anchors; more than 31 of them nobody needs


@dataclass(frozen=True)
class Stage:
    """A downsampling and the ELAN after it; all numbers are channels."""

    down: int | None  # after the downsampling; None: the stem did it
    entry: int  # of each 1x1 entry of the ELAN
    chain: int  # of each 3x3 of the ELAN
    out: int  # of the 1x1 transition


@dataclass(frozen=True)
class Level:
    """One scale of the neck, used top-down and bottom-up; all numbers are channels."""

    width: int
    entry: int
    chain: int


@dataclass(frozen=True)
class Variant:
    """What a model of the family is made of. Widths are channels, anchors (w, h) in pixels.

    Raises:
        ValueError: Its parts do not fit together; in words that name the field.
    """

    name: str
    imgsz: int
    anchors: tuple[tuple[int, ...], ...]
    stem: tuple[tuple[int, int], ...]  # (channels, stride) of the first 3x3 convolutions
    backbone: tuple[Stage, ...]
    levels: tuple[Level, ...]  # finest first; the coarsest is the SPP's output
    pairs: int = 2  # 3x3 pairs in an ELAN
    parallel: int = 1  # ELANs side by side, summed (extended ELAN)
    backbone_taps: Taps = "pairs"
    neck_taps: Taps = "all"
    backbone_down: Downsample = "conv"
    neck_down: Downsample = "conv"
    reorg: bool = False  # the stem reads space-to-depth of the image
    spp: Literal["sppcspc", "sppcspc-chained", "tiny"] = "sppcspc"
    head: Literal["conv", "repconv"] = "conv"
    early_lateral: bool = False  # the finest reads its stage's concat, before the transition
    auxiliary: float | None = None  # width of the auxiliary heads over the lead's
    activation: Literal["silu", "leaky_relu"] = "silu"
    depth: float = 1.0  # scales of this spec over the preset of its name, see `scaled`
    width: float = 1.0
    multiplier: float = 1.0
    downsample: Downsample | None = None

    def __post_init__(self) -> None:
        if not (self.name.isprintable() and 1 <= len(self.name) <= 100):
            raise ValueError("name is no printable text of 1 to 100 letters")
        widths = [
            *(channels for convolution in self.stem for channels in convolution),
            *(n for stage in self.backbone for n in astuple(stage) if n is not None),
            *(n for level in self.levels for n in astuple(level)),
        ]
        if not 1 <= len(self.levels) <= len(self.backbone):
            raise ValueError(f"levels are {len(self.levels)} of {len(self.backbone)} stages")
        anchors = {len(level) for level in self.anchors}
        if len(self.anchors) != len(self.levels) or len(anchors) != 1 or anchors.pop() not in PAIRS:
            raise ValueError("anchors must be as many pairs for every level")
        if min(self.pairs, self.parallel, self.imgsz, *widths, *chain(*self.anchors)) < 1:
            raise ValueError("pairs, parallel, imgsz, anchors, channels, strides: give 1 or more")
        if self.auxiliary is not None and not self.auxiliary > 0:
            raise ValueError(f"auxiliary is {self.auxiliary}: give more than 0, or None")
        if self.early_lateral and self.parallel > 1:
            raise ValueError("early_lateral needs one concat in a stage: parallel is more than 1")
        stride, strides = math.prod(s for _, s in self.stem) * (2 if self.reorg else 1), []
        for stage in self.backbone:
            stride *= 1 if stage.down is None else 2
            strides.append(stride)
        if tuple(strides[-len(self.levels) :]) != self.strides:
            raise ValueError(f"stem and backbone have strides {strides}, levels {self.strides}")

    @property
    def stride(self) -> int:
        """Of the coarsest level: sides of the input are multiples of it."""
        return self.strides[-1]

    @property
    def strides(self) -> tuple[int, ...]:
        """Stride of each level in pixels, finest first."""
        return tuple(8 << i for i in range(len(self.levels)))

    @property
    def head_channels(self) -> tuple[int, ...]:
        """Channels of the convolution before each detection layer."""
        return tuple(2 * level.width for level in self.levels)


def scaled(
    variant: Variant,
    depth: float = 1.0,
    width: float = 1.0,
    downsample: Downsample | None = None,
    multiplier: float = 1.0,
) -> Variant:
    """`variant` under the paper's compound scaling, and under a plain width multiplier.

    Args:
        variant: the spec to scale.
        depth: factor on the 3x3 pairs of an ELAN (rounded, at least 1).
        width: factor on every convolution except an ELAN's entries and chain (rounded up to a
            multiple of 8).
        downsample: form of all strided layers after the stem; None keeps the variant's.
        multiplier: factor on every convolution, entries and chain too (arXiv 1704.04861, section
            3.3; rounded up to a multiple of 8).

    Raises:
        ValueError: a factor that is not positive.
    """
    factors = {"depth": depth, "width": width, "multiplier": multiplier}
    for name, factor in factors.items():
        if not (math.isfinite(factor) and factor > 0):
            raise ValueError(f"{name} must be positive, got {factor}")

    def thin(channels: int) -> int:
        return math.ceil(channels * multiplier / 8) * 8

    def wide(channels: int) -> int:
        return math.ceil(channels * width * multiplier / 8) * 8

    return replace(
        variant,
        stem=tuple((wide(channels), stride) for channels, stride in variant.stem),
        backbone=tuple(
            Stage(
                None if s.down is None else wide(s.down), thin(s.entry), thin(s.chain), wide(s.out)
            )
            for s in variant.backbone
        ),
        levels=tuple(
            Level(wide(level.width), thin(level.entry), thin(level.chain))
            for level in variant.levels
        ),
        pairs=max(1, math.floor(variant.pairs * depth + 0.5)),
        backbone_down=downsample or variant.backbone_down,
        neck_down=downsample or variant.neck_down,
        depth=variant.depth * depth,
        width=variant.width * width,
        multiplier=variant.multiplier * multiplier,
        downsample=downsample or variant.downsample,
    )


TINY = Variant(
    name="yolov7-tiny",
    imgsz=640,
    anchors=(
        (10, 13, 16, 30, 33, 23),
        (30, 61, 62, 45, 59, 119),
        (116, 90, 156, 198, 373, 326),
    ),
    stem=((32, 2), (64, 2)),
    backbone=(
        Stage(None, 32, 32, 64),
        Stage(64, 64, 64, 128),
        Stage(128, 128, 128, 256),
        Stage(256, 256, 256, 512),
    ),
    levels=(Level(64, 32, 32), Level(128, 64, 64), Level(256, 128, 128)),
    pairs=1,
    backbone_taps="all",
    backbone_down="pool",
    spp="tiny",
    activation="leaky_relu",
)

TINY_SILU = replace(TINY, name="yolov7-tiny-silu", activation="silu")

V7 = Variant(
    name="yolov7",
    imgsz=640,
    anchors=(
        (12, 16, 19, 36, 40, 28),
        (36, 75, 76, 55, 72, 146),
        (142, 110, 192, 243, 459, 401),
    ),
    stem=((32, 1), (64, 2), (64, 1), (128, 2)),
    backbone=(
        Stage(None, 64, 64, 256),
        Stage(256, 128, 128, 512),
        Stage(512, 256, 256, 1024),
        Stage(1024, 256, 256, 1024),
    ),
    levels=(Level(128, 128, 64), Level(256, 256, 128), Level(512, 512, 256)),
    backbone_down="pool+conv",
    neck_down="pool+conv",
    head="repconv",
)

# X: v7 scaled, its neck in the backbone's block form and plain convolutions before the head.
X = replace(
    scaled(V7, depth=1.5, width=1.25),
    name="yolov7x",
    levels=(Level(160, 128, 128), Level(320, 256, 256), Level(640, 512, 512)),
    neck_taps="pairs",
    head="conv",
)

W6 = Variant(
    name="yolov7-w6",
    imgsz=1280,
    anchors=(
        (19, 27, 44, 40, 38, 94),
        (96, 68, 86, 152, 180, 137),
        (140, 301, 303, 264, 238, 542),
        (436, 615, 739, 380, 925, 792),
    ),
    stem=((64, 1),),
    backbone=(
        Stage(128, 64, 64, 128),
        Stage(256, 128, 128, 256),
        Stage(512, 256, 256, 512),
        Stage(768, 384, 384, 768),
        Stage(1024, 512, 512, 1024),
    ),
    levels=(
        Level(128, 128, 64),
        Level(256, 256, 128),
        Level(384, 384, 192),
        Level(512, 512, 256),
    ),
    reorg=True,
    auxiliary=1.25,
)

E6 = replace(scaled(W6, depth=1.5, width=1.25, downsample="downc"), name="yolov7-e6", auxiliary=1.0)
D6 = replace(scaled(W6, depth=2.0, width=1.5, downsample="downc"), name="yolov7-d6", auxiliary=1.0)
E6E = replace(E6, name="yolov7-e6e", parallel=2)

# The base model as MultimediaTechLab/YOLO and LibreYOLO (both MIT) draw and train it: the paper's
# layers with two other edges. Their weights load into either graph without complaint.
V7_MIT = replace(V7, name="yolov7-mit", spp="sppcspc-chained", early_lateral=True)

# Each preset is the unit of its own scales.
VARIANTS: dict[str, Variant] = {
    v.name: replace(v, depth=1.0, width=1.0, downsample=None)
    for v in (TINY, TINY_SILU, V7, X, W6, E6, D6, E6E)
}


def named(name: str) -> Variant:
    """The variant of a name.

    Raises:
        UserError: There is none.
    """
    if name not in VARIANTS:
        raise UserError(f"no variant {name!r}: choose from {', '.join(VARIANTS)}")
    return VARIANTS[name]
