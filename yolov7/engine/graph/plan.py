"""From operations to a plan: a flat list of steps over planned buffers.

What the passes do, in order:

1. fold: a max-pool before 1x1 convolutions becomes their load, an upsample after one its store,
   the sum of two branches a residual of the second, the three pools of the pyramid one step.
2. place: the parts of a concat are written by their producers into slices of its buffer, so the
   concat itself is gone; a part that has another home already is copied.
3. merge: 1x1 convolutions of one input that write neighbouring slices become one product.
4. group: independent convolutions of one kind go into one launch; the pooled branch of a
   downsampling goes with the strided one. After that every step of the family's plans reads what
   the step before it wrote: concurrent streams would have nothing to run side by side.
5. allocate: buffers whose lives do not overlap share memory.
"""

from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from yolov7.engine.graph.passes import Placement, allocate, fold, group, merge
from yolov7.engine.graph.steps import Buffer, Step, Task
from yolov7.engine.graph.trace import trace
from yolov7.kernels.runtime import H200, Rates
from yolov7.model import YOLOv7

LETTERBOX_LAUNCHES = 1
NMS_LAUNCHES = 4


@dataclass
class Plan:
    """The network for one batch and size, without the letterbox before it and the NMS after it."""

    batch: int
    height: int
    width: int
    itemsize: int  # bytes of an element of a map that is not fp8
    steps: list[Step]
    buffers: list[Buffer]
    peak_bytes: int  # size of the arena
    unfused_bytes: int  # of maps that the operations move when each runs alone

    def step_bytes(self, step: Step) -> int:
        """Bytes of feature maps that a step reads and writes."""
        slices = [where for task in step.tasks for where in (*task.reads, *task.writes)]
        images = [v for task in step.tasks for v in task.inputs if v.name == "image"]
        image_bytes = self.batch * self.itemsize * sum(v.elements for v in images)
        return image_bytes + sum(where.bytes for where in slices)

    def step_weight_bytes(self, step: Step) -> int:
        """Bytes of weights that a step reads; they are of the type of what they multiply."""
        return sum(
            conv.weight.numel() * (task.reads[0].buffer.itemsize if task.reads else self.itemsize)
            for task in step.tasks
            for conv in task.convs
        )

    def step_flops(self, step: Step) -> int:
        """Of all images, two per multiply-add."""
        return self.batch * sum(task.flops for task in step.tasks)

    def step_seconds(self, step: Step, rates: Rates = H200) -> float:
        """The step's roofline: the longer of its arithmetic and its traffic at full rate."""
        moved = self.step_bytes(step) + self.step_weight_bytes(step)
        return rates.seconds(self.step_flops(step), moved)

    def totals(self, rates: Rates = H200) -> dict[str, float]:
        """Launches, alone and with letterbox and NMS, bytes, FLOPs, expected seconds."""
        return {
            "launches": len(self.steps),
            "launches_all": len(self.steps) + LETTERBOX_LAUNCHES + NMS_LAUNCHES,
            "bytes": sum(map(self.step_bytes, self.steps)),
            "unfused_bytes": self.unfused_bytes,
            "weight_bytes": sum(map(self.step_weight_bytes, self.steps)),
            "flops": sum(map(self.step_flops, self.steps)),
            "peak_bytes": self.peak_bytes,
            "seconds": sum(self.step_seconds(step, rates) for step in self.steps),
        }


def make_plan(
    model: YOLOv7,
    batch: int,
    height: int,
    width: int,
    itemsize: int = 2,
    quantised: Collection[str] = (),
) -> Plan:
    """Lower a fused model.

    Args:
        model: in fused form.
        batch: images.
        height: of the network's input in pixels, a multiple of the model's stride.
        width: likewise.
        itemsize: bytes of an element of a feature map.
        quantised: names of the maps that may be fp8. A buffer is fp8 when all maps in it may be
            and only convolutions read and write it.

    Raises:
        ValueError: the model is not fused, or a side is not a multiple of the stride.
    """
    ops, outputs = trace(model, height, width)
    tasks, cats = fold(ops)
    placement = Placement(batch)
    tasks = placement.place(tasks, cats)
    convs = [conv for conv in model.head.lead if isinstance(conv, nn.Conv2d)]
    tasks.append(Task("head", "head", list(outputs), [], convs))
    for task in tasks:
        task.reads = [placement.slice(v) for v in task.needs if v.name != "image"]
        task.writes = [placement.slice(v) for v in task.outputs]
    placement.set_item_sizes(tasks, itemsize, quantised)
    steps = group(merge(tasks), cats)
    peak = allocate(steps, placement.buffers)
    # An operation at a time, activations in place.
    elements = sum(v.elements for op in ops for v in (*op.inputs, op.output))
    unfused = elements * batch * itemsize
    return Plan(batch, height, width, itemsize, steps, placement.buffers, peak, unfused)
