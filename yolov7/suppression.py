"""Which boxes are kept, wherever boxes are suppressed."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from yolov7.errors import UserError, at_least_one
from yolov7.kernels.nms import Detections, batched_nms


@dataclass(frozen=True, kw_only=True)
class Suppression:
    """Which boxes are kept; see `yolov7.kernels.nms`.

    Attributes:
        conf: What a box's confidence must exceed, 0..1.
        iou: Overlap with a surer box of its class above which a box is dropped, 0..1.
        max_det: Boxes per image at most.
        agnostic: Boxes of different classes suppress each other too.
        multi_label: A box for every class above `conf`, instead of the best class alone.
        classes: Numbers of the classes to look for; None: all.
        max_candidates: Boxes per image that are looked at, the surest ones.

    Raises:
        UserError: A number makes no sense.
    """

    conf: float = 0.25
    iou: float = 0.45
    max_det: int = 300
    agnostic: bool = False
    multi_label: bool = False
    classes: tuple[int, ...] | None = None
    max_candidates: int = 30000

    def __post_init__(self) -> None:
        for name in ("conf", "iou"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}: give 0 to 1")
        for name in ("max_det", "max_candidates"):
            at_least_one(name, getattr(self, name))
        if self.classes is not None:
            object.__setattr__(self, "classes", tuple(self.classes))  # pipelines are kept by it

    def on(self, device: torch.device) -> Callable[..., Detections]:
        """`batched_nms` of rows on a device, with only the rest of its tensors to say."""
        ids = self.classes
        classes = None if ids is None else torch.tensor(ids, dtype=torch.int64, device=device)

        def suppress(
            rows: Tensor, segment_counts: Tensor | None = None, frames: Tensor | None = None
        ) -> Detections:
            return batched_nms(
                rows,
                conf=self.conf,
                iou=self.iou,
                multi_label=self.multi_label,
                agnostic=self.agnostic,
                classes=classes,
                max_det=self.max_det,
                max_candidates=self.max_candidates,
                segment_counts=segment_counts,
                frames=frames,
            )

        return suppress
