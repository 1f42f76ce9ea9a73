"""The passes that turn traced operations into steps over planned buffers; see `plan`."""

from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence

from yolov7.engine.graph.steps import Buffer, Slice, Step, Task, TaskKind
from yolov7.engine.graph.trace import Op, Value
from yolov7.kernels.layout import PitchedLayout

GROUP = 3  # convolutions in one launch at most
ALIGNMENT = 1024  # bytes between the starts of buffers


def fold(ops: Sequence[Op]) -> tuple[list[Task], dict[Value, tuple[Value, ...]]]:
    """Tasks with pools, upsamples and sums folded; the concats apart, output -> parts."""
    users: dict[Value, list[Op]] = defaultdict(list)
    for op in ops:
        for value in op.inputs:
            users[value].append(op)
    tasks: list[Task] = []
    made: dict[Value, Task] = {}  # value -> the task that writes it
    stands_for: dict[Value, Value] = {}  # a folded pool's output -> its input
    cats: dict[Value, tuple[Value, ...]] = {}

    def pointwise(op: Op) -> bool:
        return op.conv is not None and op.conv.kernel_size[0] == 1

    for op in ops:
        x = op.inputs[0]
        producer = made.get(x)
        alone = len(users[x]) == 1
        if op.kind == "cat":
            cats[op.output] = op.inputs
            continue
        if op.kind == "reorg" or (op.kind == "maxpool" and all(map(pointwise, users[op.output]))):
            stands_for[op.output] = x
            continue
        if (
            op.kind == "upsample"
            and producer is not None
            and producer.convs
            and producer.kernel == 1
            and alone
            and not (producer.pool or producer.residual)
        ):
            producer.upsample = True
            producer.outputs = [op.output]
            made[op.output] = producer
            continue
        if op.kind == "add" and all(v in made for v in op.inputs):
            other, last = sorted(op.inputs, key=lambda v: tasks.index(made[v]))
            task = made[last]
            if task.convs and len(users[last]) == 1 and not (task.upsample or task.residual):
                task.residual = other
                task.outputs = [op.output]
                made[op.output] = task
                continue
        again = op.kind == "spp_pool" and op.window == 5  # of 5: a window of 9, then of 13
        if again and producer is not None and producer.windows and producer.windows[-1] < 13:
            producer.outputs.append(op.output)
            producer.windows.append(producer.windows[-1] + 4)
            made[op.output] = producer
            continue
        folded = x in stands_for
        task = Task(
            _task_kind(op, _is_image(x, stands_for)),
            op.output.name,
            [stands_for.get(v, v) for v in op.inputs],
            [op.output],
            [op.conv] if op.conv else [],
            op.activation,
            pool=folded and not _is_image(x, stands_for),
            reorg=folded and _is_image(x, stands_for),
            windows=[op.window] if op.window else [],
        )
        tasks.append(task)
        made[op.output] = task
    return tasks, cats


def _task_kind(op: Op, reads_image: bool) -> TaskKind:
    match op.kind:
        case "conv":
            return "stem" if reads_image else "conv"
        case "spp_pool":
            return "spp"
        case "maxpool" | "upsample" | "add" as kind:
            return kind
        case kind:
            raise ValueError(f"the engine has no kernel for {kind} ({op.output.name})")


def _is_image(value: Value, stands_for: dict[Value, Value]) -> bool:
    return stands_for.get(value, value).name == "image"


class Placement:
    """Which slice of which buffer holds each value."""

    def __init__(self, batch: int) -> None:
        self.batch = batch
        self.buffers: list[Buffer] = []
        self.homes: dict[Value, Slice] = {}

    def buffer(self, value: Value) -> Buffer:
        layout = PitchedLayout.of(self.batch, value.height, value.width)
        new = Buffer(len(self.buffers), value.channels, value.height, value.width, layout)
        self.buffers.append(new)
        return new

    def place(self, tasks: list[Task], cats: dict[Value, tuple[Value, ...]]) -> list[Task]:
        """Give every part of every concat a slice; the tasks, with the copies that remain."""
        copies: dict[Value, list[Task]] = defaultdict(list)  # source -> copies of it
        for whole, parts in reversed(cats.items()):  # an outer concat comes after its inner ones
            home = self.slice(whole)
            start = home.start
            for part in parts:
                here = Slice(home.buffer, start, part.channels)
                start += part.channels
                if part in self.homes or part.name == "image":
                    if part in cats:
                        raise ValueError(f"the concat {part.name} is part of two concats")
                    twin = Value(f"{part.name} copy", part.channels, part.height, part.width)
                    self.homes[twin] = here
                    copies[part].append(Task("copy", twin.name, [part], [twin]))
                else:
                    self.homes[part] = here
        placed: list[Task] = []
        for task in tasks:
            placed.append(task)
            for value in task.outputs:
                placed += copies[value]
        return placed

    def slice(self, value: Value) -> Slice:
        """The home of a value; one of its own if it is in no concat."""
        if value not in self.homes:
            self.homes[value] = Slice(self.buffer(value), 0, value.channels)
        return self.homes[value]

    def set_item_sizes(self, tasks: list[Task], itemsize: int, quantised: Collection[str]) -> None:
        """Bytes of an element of every buffer: 1 (fp8) where it may be, else `itemsize`."""
        for buffer in self.buffers:
            buffer.itemsize = itemsize
        if not quantised:
            return
        precise = {
            where.buffer.index
            for task in tasks
            for where in (*task.reads, *task.writes)
            if task.kind != "conv"
            and not (task.kind == "stem" and task.outputs[0].name in quantised)
        }
        precise |= {
            where.buffer.index
            for task in tasks
            for value, where in zip(task.outputs, task.writes, strict=True)
            if value.name not in quantised
        }
        for buffer in self.buffers:
            if buffer.index not in precise:
                buffer.itemsize = 1


def merge(tasks: list[Task]) -> list[Task]:
    """One product for 1x1 convolutions of one input that write neighbouring slices.

    Expects `writes` to be planned.
    """
    merged: list[Task] = []
    for task in tasks:
        twin = next((t for t in reversed(merged) if _neighbours(t, task)), None)
        if twin is None:
            merged.append(task)
            continue
        first, second = sorted((twin, task), key=lambda t: t.writes[0].start)
        twin.convs, twin.outputs = first.convs + second.convs, first.outputs + second.outputs
        start, channels = first.writes[0].start, sum(t.writes[0].channels for t in (twin, task))
        twin.name = f"{first.name} + {second.name.rpartition('.')[2]}"
        twin.writes = [Slice(task.writes[0].buffer, start, channels)]
    return merged


def _neighbours(a: Task, b: Task) -> bool:
    if not (a.kind == b.kind == "conv" and a.inputs == b.inputs and a.kernel == b.kernel == 1):
        return False
    if a.groups_with != b.groups_with or a.upsample or a.residual or b.residual:
        return False
    first, second = sorted((a.writes[0], b.writes[0]), key=lambda s: s.start)
    return first.buffer is second.buffer and first.start + first.channels == second.start


def group(tasks: list[Task], cats: dict[Value, tuple[Value, ...]]) -> list[Step]:
    """Steps in an order that respects the data, convolutions of one kind together."""
    written: set[Value] = set()

    def ready(value: Value) -> bool:
        return value in written or (value in cats and all(map(ready, cats[value])))

    waiting = list(tasks)
    steps = []
    while waiting:
        first = waiting[0]
        together = [first]
        if first.kind == "conv":
            together += [
                t
                for t in waiting[1:]
                if t.kind == "conv"
                and t.groups_with == first.groups_with
                and all(map(ready, t.needs))
            ][: GROUP - 1]
        steps.append(Step(together))
        for task in together:
            waiting.remove(task)
            written.update(task.outputs)
    return steps


def allocate(steps: list[Step], buffers: list[Buffer]) -> int:
    """Give buffers their lives and their offsets in the arena; its size in bytes.

    The largest buffer first, each at the lowest offset where no buffer that lives at the same
    time is in its way.
    """
    lives: dict[int, list[int]] = defaultdict(list)
    for i, step in enumerate(steps):
        for task in step.tasks:
            for where in (*task.reads, *task.writes):
                lives[where.buffer.index].append(i)
    for buffer in buffers:
        buffer.first, buffer.last = min(lives[buffer.index]), max(lives[buffer.index])
        size = buffer.layout.rows * buffer.channels * buffer.itemsize
        buffer.bytes = -(-size // ALIGNMENT) * ALIGNMENT
    placed: list[Buffer] = []
    for buffer in sorted(buffers, key=lambda b: -b.bytes):
        for other in sorted(_contemporaries(buffer, placed), key=lambda b: b.offset):
            if buffer.offset + buffer.bytes <= other.offset:
                break
            buffer.offset = max(buffer.offset, other.offset + other.bytes)
        placed.append(buffer)
    return max((b.offset + b.bytes for b in buffers), default=0)


def _contemporaries(buffer: Buffer, others: Sequence[Buffer]) -> Iterator[Buffer]:
    return (b for b in others if b.first <= buffer.last and buffer.first <= b.last)
