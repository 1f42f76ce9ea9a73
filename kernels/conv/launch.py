"""What is launched at once: how it is named, looked up, checked, tried and prepared to run."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol, Self

import torch
from torch import Tensor

from yolov7.kernels.conv.config import ConvConfig, Key, find_config
from yolov7.kernels.conv.launcher import launch_conv, workspace_elements
from yolov7.kernels.conv.layer import ConvCall, to_dtype
from yolov7.kernels.conv.model import corners, ranked, stem_timed, timed
from yolov7.kernels.conv.search import (
    default_config,
    default_stem_config,
    fits_tma,
    search_space,
    stem_search_space,
)
from yolov7.kernels.conv.stem import StemCall, launch_stem
from yolov7.kernels.runtime import DTYPE_NAMES, runs_kernels


class Workspace:
    """fp32 memory that launches which follow one another share; it grows as they are prepared."""

    def __init__(self) -> None:
        self.memory: Tensor | None = None

    def reserve(self, elements: int, device: torch.device) -> None:
        """Have room for at least so many elements."""
        if elements and (self.memory is None or self.memory.numel() < elements):
            self.memory = torch.empty(elements, device=device)


class Launch(Protocol):
    """Convolutions that are computed together.

    `ConvLaunch` and `StemLaunch` are the two: what plans hold, the tuner tries, `aot` compiles.
    """

    @property
    def calls(self) -> Sequence[ConvCall | StemCall]:
        """Its layers, with their tensors."""

    @property
    def name(self) -> str:
        """One readable line: ``1x64x80x80 -> 128, 3x3 s1 fp16``."""

    @property
    def key(self) -> Key:
        """What its config is looked up by."""

    def reference(self) -> list[Tensor]:
        """What each layer is to write, in fp32, in plain PyTorch."""

    def random(self, device: torch.device) -> Self:
        """The same with memory of its own and random content, outputs O(1)."""

    def configs(self) -> list[ConvConfig]:
        """Configs worth trying on its tensors' device, the default one first, then likely ones."""

    def takes(self, config: ConvConfig) -> bool:
        """Whether a config of its kind suits its tensors too."""

    def chosen(self) -> ConvConfig:
        """The tuned config of the nearest launch on this device, or the default one."""

    def expected(self) -> tuple[float, ...]:
        """Seconds with the chosen config in each corner of `yolov7.kernels.conv.model`."""

    def prepare(
        self, config: ConvConfig | None = None, workspace: Workspace | None = None
    ) -> Callable[[], None]:
        """What runs it: the kernels, or on a CPU its reference.

        Args:
            config: by default the chosen one.
            workspace: what it shares with other launches; by default its own.

        Raises:
            ValueError: tensors do not fit their layers.
        """


@dataclass(frozen=True, eq=False)
class ConvLaunch:
    """One to three layers over pitched maps that agree in everything but sizes; see `Launch`.

    A 1x1 behind a max-pool may stand beside a 3x3 of stride 2.
    """

    calls: Sequence[ConvCall]

    @property
    def name(self) -> str:
        marks = (" sum" if c.residual is not None else "" for c in self.calls)
        layers = (c.layer.describe() + mark for c, mark in zip(self.calls, marks, strict=True))
        return f"{'; '.join(layers)} {_precision(self.calls[0], self.calls[0].x)}"

    @property
    def key(self) -> Key:
        """Kind, ``3x3s2+1x1s1-pool-to-fp16-fp8``; rows, output channels and terms of each layer.

        The types of outputs belong to it where they are another than the inputs': a tile of the
        output waits in shared memory, and twice as wide it may leave no room for the pipeline.
        """
        kinds = []
        for call in self.calls:
            layer = call.layer
            added = call.residual is not None
            marks = {"pool": layer.pool, "upsample": layer.upsample, "sum": added}
            marks[f"to-{DTYPE_NAMES[call.out.dtype]}"] = call.out.dtype != call.x.dtype
            options = "".join(f"-{name}" for name, on in marks.items() if on)
            kinds.append(f"{layer.kernel}x{layer.kernel}s{layer.stride}{options}")
        layers = [c.layer for c in self.calls]
        size = tuple(n for x in layers for n in (x.compute.rows, x.out_channels, x.length))
        return f"{'+'.join(kinds)}-{_precision(self.calls[0], self.calls[0].x)}", size

    def reference(self) -> list[Tensor]:
        return [call.reference() for call in self.calls]

    def random(self, device: torch.device) -> Self:
        return replace(self, calls=[call.random(device) for call in self.calls])

    def configs(self) -> list[ConvConfig]:
        return [choice.config for choice in ranked(self.calls, search_space(self.calls))]

    def takes(self, config: ConvConfig) -> bool:
        return not config.tma or fits_tma(self.calls)

    def chosen(self) -> ConvConfig:
        config = find_config(self.key, self.calls[0].x.device)
        return config if config is not None and self.takes(config) else default_config(self.calls)

    def expected(self) -> tuple[float, ...]:
        at = corners(self.calls[0].x.device)
        return tuple(map(timed(self.calls, self.chosen()), at))

    def prepare(
        self, config: ConvConfig | None = None, workspace: Workspace | None = None
    ) -> Callable[[], None]:
        for call in self.calls:
            call.check()
        device = self.calls[0].x.device
        if not runs_kernels(device):
            return partial(_run_reference, self)
        config, room = config or self.chosen(), workspace or Workspace()
        room.reserve(workspace_elements(self.calls, config), device)
        # Another launch may make the workspace grow until all are prepared.
        return lambda: launch_conv(self.calls, config, room.memory)


@dataclass(frozen=True, eq=False)
class StemLaunch:
    """The first convolution; see `Launch`."""

    call: StemCall

    @property
    def calls(self) -> Sequence[StemCall]:
        return [self.call]

    @property
    def name(self) -> str:
        return f"{self.call.describe()} {_precision(self.call, self.call.out)}"

    @property
    def key(self) -> Key:
        """Kind, ``stem3x3s1-fp16``; rows and output channels."""
        stem, out = self.call.layer, self.call.out
        kind = f"stem{stem.kernel}x{stem.kernel}s{stem.stride}-{_precision(self.call, out)}"
        return kind, (stem.target.rows, out.shape[1])

    def reference(self) -> list[Tensor]:
        return [self.call.reference()]

    def random(self, device: torch.device) -> Self:
        return replace(self, call=self.call.random(device))

    def configs(self) -> list[ConvConfig]:
        return list(dict.fromkeys((default_stem_config(self.call), *stem_search_space(self.call))))

    def takes(self, config: ConvConfig) -> bool:
        return not config.tma

    def chosen(self) -> ConvConfig:
        config = find_config(self.key, self.call.out.device)
        return config if config and self.takes(config) else default_stem_config(self.call)

    def expected(self) -> tuple[float, ...]:
        return tuple(map(stem_timed(self.call), corners(self.call.out.device)))

    def prepare(
        self,
        config: ConvConfig | None = None,
        workspace: Workspace | None = None,  # noqa: ARG002 - `Launch`'s; no stem's sum is split
    ) -> Callable[[], None]:
        self.call.check()
        if not runs_kernels(self.call.out.device):
            return partial(_run_reference, self)
        return partial(launch_stem, self.call, config or self.chosen())


def _precision(call: ConvCall | StemCall, tensor: Tensor) -> str:
    return "exact" if call.exact else DTYPE_NAMES[tensor.dtype]


def _run_reference(launch: Launch) -> None:
    for call, result in zip(launch.calls, launch.reference(), strict=True):
        call.out.copy_(to_dtype(result, call.out.dtype, call.layer.out_scale))
