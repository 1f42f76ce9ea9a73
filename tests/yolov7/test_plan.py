"""The engine's plan: what it folds, where values lie, that nothing overwrites what is read."""

from itertools import combinations, pairwise

import pytest
import torch

from yolov7.engine.graph.plan import Plan, make_plan
from yolov7.engine.graph.trace import trace
from yolov7.model import YOLOv7
from yolov7.variants import VARIANTS

LAUNCHES = {
    "yolov7-tiny": 44,
    "yolov7": 73,
    "yolov7x": 89,
    "yolov7-w6": 87,
    "yolov7-e6": 117,
    "yolov7-d6": 139,
    "yolov7-e6e": 128,
}


def fused(name: str) -> YOLOv7:
    with torch.device("meta"):
        return YOLOv7(VARIANTS[name], 80, "deploy").fuse()


@pytest.fixture(scope="module", params=LAUNCHES)
def plan(request: pytest.FixtureRequest) -> Plan:
    model = fused(request.param)
    return make_plan(model, 1, model.imgsz, model.imgsz)


def test_launches_stay_few(plan: Plan, request: pytest.FixtureRequest) -> None:
    name = request.node.callspec.params["plan"]
    assert len(plan.steps) == LAUNCHES[name]
    kinds = {step.kind for step in plan.steps}
    assert kinds == {"stem", "conv", "spp", "head"}  # no copy, pool, upsample or sum is left


def test_all_the_arithmetic_is_there(plan: Plan, request: pytest.FixtureRequest) -> None:
    from yolov7.layers import conv_layers

    model = fused(request.node.callspec.params["plan"])
    layers = conv_layers(model, model.imgsz, model.imgsz)
    assert plan.totals()["flops"] == sum(layer.flops for layer in layers)


def test_every_convolution_runs_once(plan: Plan) -> None:
    convs = [id(conv) for step in plan.steps for task in step.tasks for conv in task.convs]
    assert len(convs) == len(set(convs))


def test_what_is_read_was_written_and_is_not_overwritten(plan: Plan) -> None:
    """Replays the plan on the arena's bytes: each channel of each buffer has one writer."""
    owner: dict[tuple[int, int], int] = {}  # (buffer, channel) -> the step that wrote it
    for i, step in enumerate(plan.steps):
        for task in step.tasks:
            for where in task.reads:
                for channel in range(where.start, where.start + where.channels):
                    assert (where.buffer.index, channel) in owner, (task.name, channel)
        for task in step.tasks:
            for where in task.writes:
                assert where.start + where.channels <= where.buffer.channels
                for channel in range(where.start, where.start + where.channels):
                    assert (where.buffer.index, channel) not in owner, (task.name, channel)
                    owner[where.buffer.index, channel] = i
    for a, b in combinations(plan.buffers, 2):
        together = a.first <= b.last and b.first <= a.last
        apart = a.offset + a.bytes <= b.offset or b.offset + b.bytes <= a.offset
        assert apart or not together
    assert plan.peak_bytes == max(b.offset + b.bytes for b in plan.buffers)
    assert plan.peak_bytes < 0.4 * sum(b.bytes for b in plan.buffers)


def test_grouped_tasks_do_not_depend_on_each_other(plan: Plan) -> None:
    for step in plan.steps:
        written = {v.name for task in step.tasks for v in task.outputs}
        assert not written & {v.name for task in step.tasks for v in task.needs}
        assert len({task.groups_with for task in step.tasks if task.convs}) <= 1


def test_steps_are_a_chain(plan: Plan) -> None:
    """Each needs the one before it, so that streams for branches could not overlap any two."""
    for before, step in pairwise(plan.steps):
        written = [where for task in before.tasks for where in task.writes]
        read = [where for task in step.tasks for where in task.reads]
        assert any(
            a.buffer is b.buffer
            and a.start < b.start + b.channels
            and b.start < a.start + a.channels
            for a in written
            for b in read
        )


def test_totals_of_v7() -> None:
    plan = make_plan(fused("yolov7"), 1, 640, 640)
    totals = plan.totals()
    assert totals["launches"] == 73
    assert totals["launches_all"] == 78
    assert totals["bytes"] <= 0.78 * totals["unfused_bytes"]
    assert totals["bytes"] == pytest.approx(410e6, rel=0.01)  # what convolutions read and write
    assert totals["weight_bytes"] == pytest.approx(2 * 36.9e6, rel=0.01)
    assert 1.3e-4 < totals["seconds"] < 2.5e-4  # 104.5 GFLOP and 0.48 GB on an H200


def test_batch_scales_maps_and_not_weights() -> None:
    one, many = (make_plan(fused("yolov7-tiny"), b, 64, 96) for b in (1, 8))
    assert many.totals()["flops"] == 8 * one.totals()["flops"]
    assert one.peak_bytes < many.peak_bytes <= 8 * one.peak_bytes
    assert many.totals()["bytes"] == 8 * one.totals()["bytes"]
    assert many.totals()["weight_bytes"] == one.totals()["weight_bytes"]


def test_refusals() -> None:
    model = fused("yolov7-tiny")
    with pytest.raises(ValueError, match="no multiple of 32"):
        make_plan(model, 1, 100, 64)
    with torch.device("meta"):
        unfused = YOLOv7(VARIANTS["yolov7-tiny"], 80, "deploy")
    with pytest.raises(ValueError, match="only a fused model"):
        trace(unfused, 64, 64)
