"""YOLOv7, generated from a `Variant`: stem, backbone, pyramid pooling, neck, head."""

from collections.abc import Sequence
from typing import Literal, Self, TypeVar, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from yolov7.blocks import (
    SPPCSPC,
    Activation,
    Conv,
    DownC,
    Elan,
    MaxPool,
    ParallelElan,
    PoolConv,
    ReOrg,
    RepConv,
    TinySPP,
)
from yolov7.head import Detect
from yolov7.variants import Downsample, Variant, named, scaled

Form = Literal["training", "deploy", "fused"]

M = TypeVar("M", bound=nn.Module)


def _downsample(kind: Downsample, inputs: int, out: int, activation: Activation) -> nn.Module:
    match kind:
        case "conv":
            return Conv(inputs, out, 3, 2, activation)
        case "pool":
            return MaxPool(inputs)
        case "pool+conv":
            return PoolConv(inputs, out, activation)
        case "downc":
            return DownC(inputs, out, activation)


class BackboneStage(nn.Module):
    """Downsampling (where there is one), then the ELAN.

    Args:
        down: the downsampling.
        elan: what follows.
        early: the neck reads the ELAN's concat, not its output.
    """

    def __init__(self, down: nn.Module | None, elan: ParallelElan, *, early: bool) -> None:
        super().__init__()
        self.down = down
        self.elan = elan
        self.early = early

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The stage's map, and what the neck reads of the stage."""
        x = x if self.down is None else self.down(x)
        if not self.early:
            y = self.elan(x)[0]
            return y, y
        return self.elan.apart(x)


class TopDown(nn.Module):
    """A coarser map, reduced and upsampled, beside the backbone's; then the ELAN."""

    def __init__(self, reduce: Conv, lateral: Conv, elan: ParallelElan) -> None:
        super().__init__()
        self.reduce = reduce
        self.lateral = lateral
        self.elan = elan

    def forward(self, coarse: Tensor, fine: Tensor) -> tuple[Tensor, Tensor]:
        """The level's map, and that of the ELAN's last branch."""
        coarse = F.interpolate(self.reduce(coarse), scale_factor=2.0, mode="nearest")
        return self.elan(torch.cat([self.lateral(fine), coarse], 1))


class BottomUp(nn.Module):
    """A finer map, downsampled, beside the top-down one; then the ELAN."""

    def __init__(self, down: nn.Module, elan: ParallelElan) -> None:
        super().__init__()
        self.down = down
        self.elan = elan

    def forward(self, fine: Tensor, skip: Tensor) -> Tensor:
        return self.elan(torch.cat([self.down(fine), skip], 1))[0]


class YOLOv7(nn.Module):
    """The network.

    Args:
        variant: what to build.
        num_classes: number of classes.
        form: "training" has implicit vectors and auxiliary heads; "deploy" does not.
    """

    def __init__(self, variant: Variant, num_classes: int, form: Form) -> None:
        super().__init__()
        v, act = variant, variant.activation
        self.variant = variant
        self.form: Form = form
        self.names = [f"class{i}" for i in range(num_classes)]
        self.imgsz = variant.imgsz  # the side in pixels that it is meant for
        # Of the maps, from calibration: "fp8" or "int8" -> map -> its largest magnitude.
        self.ranges: dict[str, dict[str, float]] = {}
        training = form == "training"

        def elan(inputs: int, entry: int, chain: int, out: int, taps: str) -> ParallelElan:
            return ParallelElan(
                lambda: Elan(
                    inputs,
                    entry=entry,
                    chain=chain,
                    pairs=v.pairs,
                    all_taps=taps == "all",
                    out=out,
                    activation=act,
                ),
                v.parallel,
            )

        width = 12 if v.reorg else 3
        self.stem = nn.Sequential(*([ReOrg()] if v.reorg else []))
        for channels, stride in v.stem:
            self.stem.append(Conv(width, channels, 3, stride, act))
            width = channels

        self.backbone = nn.ModuleList()
        features = []  # channels of what the neck reads of the backbone
        finest = len(v.backbone) - len(v.levels)
        for index, stage in enumerate(v.backbone):
            down = None
            if stage.down is not None:
                down = _downsample(v.backbone_down, width, stage.down, act)
                width = int(down.out_channels)  # type: ignore[arg-type]  # every block has it
            block = elan(width, stage.entry, stage.chain, stage.out, v.backbone_taps)
            early = v.early_lateral and index == finest
            self.backbone.append(BackboneStage(down, block, early=early))
            width = block.out_channels
            features.append(block.concat_channels if early else width)

        *finer, top = v.levels
        self.spp = (
            TinySPP(width, top.width, act)
            if v.spp == "tiny"
            else SPPCSPC(width, top.width, act, chained=v.spp == "sppcspc-chained")
        )

        self.top_down = nn.ModuleList()  # coarsest first
        width = top.width
        for level, channels in zip(finer[::-1], features[-2::-1], strict=False):
            w = level.width
            block = elan(2 * w, level.entry, level.chain, w, v.neck_taps)
            self.top_down.append(
                TopDown(Conv(width, w, 1, 1, act), Conv(channels, w, 1, 1, act), block)
            )
            width = w

        self.bottom_up = nn.ModuleList()  # finest first
        for level in v.levels[1:]:
            w = level.width
            down = _downsample(v.neck_down, width, w, act)
            inputs = int(down.out_channels) + w  # type: ignore[arg-type]  # every block has it
            block = elan(inputs, level.entry, level.chain, w, v.neck_taps)
            self.bottom_up.append(BottomUp(down, block))
            width = w

        self.lead_convs = nn.ModuleList(
            RepConv(level.width, out, act)
            if v.head == "repconv"
            else Conv(level.width, out, 3, 1, act)
            for level, out in zip(v.levels, v.head_channels, strict=True)
        )
        auxiliary = [round(c * v.auxiliary) for c in v.head_channels] if v.auxiliary else []
        self.auxiliary_convs = nn.ModuleList(
            Conv(level.width, out, 3, 1, act)
            for level, out in zip(v.levels, auxiliary, strict=False)
            if training
        )
        self.head = Detect(
            v.head_channels,
            num_classes,
            v.anchors,
            v.strides,
            implicit=training,
            auxiliary=auxiliary if training else (),
        )

    def __repr__(self) -> str:
        """One line; `yolov7 info` and `named_modules()` have the layers."""
        millions = parameter_count(self) / 1e6
        return (
            f"YOLOv7({self.variant.name!r}, {len(self.names)} classes, form={self.form!r}, "
            f"{millions:.1f} M parameters)"
        )

    @property
    def stride(self) -> int:
        """The coarsest level's stride; image sides must be multiples of it."""
        return self.head.strides[-1]

    def features(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Maps for the lead and for the auxiliary heads, finest level first."""
        x = self.stem(x)
        maps = []
        for stage in self.backbone:
            x, lateral = stage(x)
            maps.append(lateral)
        x = self.spp(x)
        lead, auxiliary = [x], [x]
        for block, fine in zip(self.top_down, maps[-2::-1], strict=False):
            x, last = block(x, fine)
            lead.insert(0, x)
            auxiliary.insert(0, last)
        for i, block in enumerate(self.bottom_up, start=1):
            x = block(x, lead[i])
            lead[i] = x
        return lead, auxiliary

    def lead_outputs(self, x: Tensor) -> list[Tensor]:
        """Raw outputs of the lead levels alone; x as for `forward`."""
        maps = zip(self.lead_convs, self.features(x)[0], strict=True)
        return self.head.raw([conv(y) for conv, y in maps])

    @overload
    def forward(self, x: Tensor, raw: Literal[True]) -> tuple[Tensor, list[Tensor]]: ...
    @overload
    def forward(self, x: Tensor, raw: Literal[False] = False) -> Tensor | list[Tensor]: ...
    def forward(
        self, x: Tensor, raw: bool = False
    ) -> Tensor | list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Detect.

        Args:
            x: [B, 3, H, W] RGB in 0..1, H and W multiples of `stride`.
            raw: in evaluation mode, return the raw outputs too.

        Returns:
            Training mode: the raw outputs, [B, anchors, ny, nx, 5 + classes] each, lead levels
            first, then auxiliary levels. Evaluation mode: decoded boxes [B, N, 5 + classes] (see
            `Detect.decode`); with `raw`, these and the raw outputs.
        """
        if not (self.training or raw):
            return self.head.decode(self.lead_outputs(x))
        lead, auxiliary = self.features(x)
        lead = [conv(y) for conv, y in zip(self.lead_convs, lead, strict=True)]
        auxiliary = [conv(y) for conv, y in zip(self.auxiliary_convs, auxiliary, strict=False)]
        outputs = self.head.raw(lead, auxiliary)
        return outputs if self.training else (self.head.decode(outputs), outputs)

    def fuse(self) -> Self:
        """Fold to convolution, bias and activation, in place, for inference; again: nothing.

        Every block folds itself; auxiliary heads are dropped.
        """
        for module in [m for m in self.modules() if m is not self and hasattr(m, "fuse")]:
            module.fuse()  # type: ignore[operator]  # hasattr has looked
        self.auxiliary_convs = nn.ModuleList()
        self.form = "fused"
        return self.eval()


def parameter_count(module: nn.Module) -> int:
    """Number of parameters, those of training branches and auxiliary heads included."""
    return sum(p.numel() for p in module.parameters())


def channels_last(module: M, *args: torch.device | torch.dtype) -> M:
    """The module moved as `nn.Module.to` does it, its weights in channels_last."""
    moved: M = module.to(*args, memory_format=torch.channels_last)  # type: ignore[call-overload]  # stub lacks it
    return moved


def create_model(
    name: str,
    num_classes: int = 80,
    *,
    form: Literal["training", "deploy"] = "training",
    depth: float = 1.0,
    width: float = 1.0,
    downsample: Downsample | None = None,
    multiplier: float = 1.0,
    names: Sequence[str] | None = None,
) -> YOLOv7:
    """A freshly initialised member of the family.

    Args:
        name: a key of `yolov7.variants.VARIANTS`, such as "yolov7-tiny".
        num_classes: number of classes, at least 1.
        form: "training" (implicit vectors, auxiliary heads) or "deploy".
        depth: compound scale of the depth over the named variant's.
        width: compound scale of the width over the named variant's.
        downsample: form of the strided layers; None keeps the variant's.
        multiplier: plain factor on the channels of every convolution, see `variants.scaled`.
        names: class names, `num_classes` of them.

    Raises:
        ValueError: an unknown name, form or downsampling, or a number out of range.
    """
    base = named(name)
    if form not in ("training", "deploy"):
        raise ValueError(f"form must be 'training' or 'deploy', got {form!r}")
    if downsample not in (None, "conv", "pool", "pool+conv", "downc"):
        raise ValueError(f"downsample must be conv, pool, pool+conv or downc, got {downsample!r}")
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    if names is not None and len(names) != num_classes:
        raise ValueError(f"{len(names)} class names for {num_classes} classes")
    model = YOLOv7(scaled(base, depth, width, downsample, multiplier), num_classes, form)
    if names is not None:
        model.names = list(names)
    return model
