"""How far a plan's results are from the eager model's.

Pixels say little: most of a box's numbers are its place on the grid. So decoded boxes are taken
back to what the head's sigmoids gave, between 0 and 1, and scores further, to logits; then rounding
is of one size whatever is in the picture, and each level of the head is judged for itself.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from yolov7.head import Detect

# Root mean square of the difference beyond which a plan is wrong, of boxes and of scores: four
# times what rounding made of the demo model on cells, black, white, grey and noise at the most.
# PyTorch's convolutions in fp32 are TF32 on a GPU, as coarse as fp16.
TOLERANCE = {
    "fp32": (2.5e-3, 4e-2),
    "fp16": (2.5e-3, 4e-2),
    "bf16": (2e-2, 0.35),
    "fp8": (0.14, 2.7),
    "int8": (0.14, 2.7),
}
CERTAIN = 1e-6  # logits of what is nearer to 0 or 1 are cut off


def why_wrong(
    decoded: Tensor, expected: Tensor, head: Detect, size: tuple[int, int], precision: str
) -> str:
    """What of a plan's result is not the eager model's; empty where all of it is.

    Args:
        decoded: [B, N, 5 + classes] of the plan, as `Detect.decode` gives them.
        expected: The same of the eager model.
        head: Of the model.
        size: (height, width) of the network's input in pixels.
        precision: Of the plan.
    """
    boxes, scores = TOLERANCE[precision]
    pairs = zip(_levels(decoded, head, size), _levels(expected, head, size), strict=True)
    for level, (ours, theirs) in enumerate(pairs):
        for what, part, limit in (
            ("boxes", slice(4), boxes),
            ("objectness", slice(4, 5), scores),
            ("classes", slice(5, None), scores),
        ):
            difference = float((ours[..., part] - theirs[..., part]).square().mean().sqrt())
            if not difference <= limit:  # NaN, too
                return f"the {what} of level {level} are off PyTorch's by {difference:.1e}"
    return ""


def _levels(decoded: Tensor, head: Detect, size: tuple[int, int]) -> Iterator[Tensor]:
    """Of each level [B, anchors, ny, nx, 5 + classes]: sigmoids of the box, logits of scores."""
    start = 0
    for anchors, stride in zip(head.anchors.to(decoded.device), head.strides, strict=False):
        height, width = (side // stride for side in size)
        count = len(anchors) * height * width
        rows = decoded[:, start : start + count].double()
        start += count
        rows = rows.view(len(rows), len(anchors), height, width, -1)
        x = rows[..., 0] / stride - torch.arange(width, device=rows.device)
        y = rows[..., 1] / stride - torch.arange(height, device=rows.device).view(-1, 1)
        centres = (torch.stack([x, y], -1) + 0.5) / 2
        sizes = (rows[..., 2:4] / anchors.view(-1, 1, 1, 2)).sqrt() / 2
        yield torch.cat([centres, sizes, rows[..., 4:].logit(CERTAIN)], -1)
