"""`python -m bench.peers`: our CPU engines beside ONNX Runtime and OpenVINO.

Each contender has a process of its own, as in use, and they take turns while the others sleep: in
one process the threads of one runtime spin on when its turn is over, and slow whoever is next. The
peers run the files that `yolov7 export` writes, with as many threads as PyTorch has. One that is
not installed is left out, and said. Batch 1, dense decoded boxes, no suppression anywhere. int8 is
calibrated on the one image by `yolov7.engine.graph.calibrate`; the peers run the int8 file, and
ONNX Runtime also what its own static quantisation makes of the other.

`--neighbour 0` (its niceness) also times each beside a process that never rests, as on a machine
that others use. Set `GOMP_SPINCOUNT=1000` for it, as the `yolov7` commands do. `--save` keeps the
rows in bench/results/peers.json, of which `python -m bench.tables` makes a table in docs/speed.md.
"""

import argparse
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from functools import partial
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from bench.comparison import Missing, close
from bench.eight_bits import calibrated, quantised
from bench.results import OURS, RESULTS, Report, Row, comparison_table, left_out
from yolov7.atomic import atomic
from yolov7.benchmark.clock import Pace, Run, Work
from yolov7.engine.choose import Runtime, open_network
from yolov7.errors import UserError
from yolov7.export import Settings, export
from yolov7.layers import conv_layers
from yolov7.model import YOLOv7, create_model

KEPT = RESULTS / "peers.json"
TOLERANCE = {"bf16": 2e-2, "int8": 0.2}  # int8 of random weights; what AP loses is measured
TURN = 0.3  # seconds

Make = Callable[[], Run | Missing]


def ours(model: YOLOv7, x: Tensor, precision: str, engine: str) -> Run | Missing:
    """Our network on a copy of the model."""
    try:
        network = open_network(
            Runtime(weights=fresh(model), device="cpu", precision=precision, engine=engine)
        )
    except UserError as error:
        return Missing(str(error))
    return partial(network, x)


def onnxruntime(path: Path, x: Tensor) -> Run | Missing:
    """ONNX Runtime, fp32."""
    if not find_spec("onnxruntime"):
        return Missing("onnxruntime is not installed")
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(path), options, ["CPUExecutionProvider"])
    inputs = {session.get_inputs()[0].name: x.numpy()}
    return lambda: torch.from_numpy(session.run(None, inputs)[0])


def openvino(path: Path, x: Tensor, precision: str) -> Run | Missing:
    """OpenVINO, meant for latency."""
    if not find_spec("openvino"):
        return Missing("openvino is not installed")
    import openvino

    config = {
        "INFERENCE_PRECISION_HINT": {"fp32": "f32"}.get(precision, precision),
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.Core().compile_model(path, "CPU", config).create_infer_request()
    pixels = x.numpy()

    def run() -> Tensor:
        (decoded,) = request.infer([pixels], share_inputs=True, share_outputs=True).values()
        return torch.from_numpy(decoded)

    return run


def makers(model: YOLOv7, size: int, folder: Path, *, compiled: bool) -> dict[str, Make]:
    """What makes each forward of one random image, in its own process; `OURS` is held against all.

    Args:
        model: In deploy form.
        size: Side of the image in pixels.
        folder: For the exported files.
        compiled: Ours by torch.compile too, which takes a minute to start.
    """
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    calibrated(model, x)
    engines = ("eager", "compile") if compiled else ("eager",)
    found: dict[str, Make] = {}
    for engine, precision in ((e, p) for e in engines for p in ("fp32", "bf16")):
        words = [OURS, *[engine] * (engine != "eager"), *[precision] * (precision != "fp32")]
        found[", ".join(words)] = partial(ours, model, x, precision, engine)
    found[f"{OURS}, int8"] = partial(ours, model, x, "int8", "eager")
    path, narrow = folder / "fp32.onnx", folder / "int8.onnx"
    with redirect_stdout(sys.stderr):
        export(model, path, Settings(imgsz=(size, size)))
        export(model, narrow, Settings(imgsz=(size, size), precision="int8"))
    found["onnxruntime, fp32"] = partial(onnxruntime, path, x)
    found["onnxruntime, int8"] = partial(onnxruntime, narrow, x)
    if find_spec("onnxruntime"):
        found["onnxruntime's own, int8"] = partial(onnxruntime, quantised(path, x), x)
    for precision in ("fp32", "bf16"):
        found[f"openvino, {precision}"] = partial(openvino, path, x, precision)
    found["openvino, int8"] = partial(openvino, narrow, x, "fp32")
    return found


def fresh(model: YOLOv7) -> YOLOv7:
    """A copy, since a network takes its model over."""
    copy = YOLOv7(model.variant, model.head.num_classes, "deploy")
    copy.load_state_dict(model.state_dict())
    copy.ranges = model.ranges
    return copy.eval()


@contextmanager
def neighbour(niceness: int) -> Iterator[None]:
    """A process beside ours that never rests."""
    code = f"import os; os.nice({niceness}); print(flush=True)\nwhile True: pass"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            process.stdout.readline()  # it is busy
            yield
        finally:
            process.kill()


class Contender:
    """A forward in a process of its own.

    Args:
        make: What makes it there.
        threads: Of PyTorch.

    Attributes:
        result: Of its first call, or why it cannot take part.
    """

    def __init__(self, make: Make, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, make, threads), daemon=True)
        self._process.start()
        there.close()
        first = self._pipe.recv()
        self.result = first if isinstance(first, Missing) else torch.from_numpy(first)

    def turn(self) -> list[float]:
        """Seconds of each call of a turn."""
        self._pipe.send(TURN)
        seconds: list[float] = self._pipe.recv()
        return seconds

    def __enter__(self) -> "Contender":
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.join()


def _serve(pipe: Connection, make: Make, threads: int) -> None:
    torch.set_num_threads(threads)
    run = make()
    if isinstance(run, Missing):
        pipe.send(run)
        return
    pipe.send(run().numpy())
    while True:
        end = time.perf_counter() + pipe.recv()
        run()  # threads are awake, caches warm
        seconds: list[float] = []
        while not seconds or time.perf_counter() < end:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        pipe.send(seconds)


def race(contenders: Mapping[str, Contender], pace: Pace) -> dict[str, list[float]]:
    """Seconds of each contender's calls, in turns until the time is over."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    end = time.perf_counter() + pace.seconds
    for turn in range(pace.most):
        if turn and time.perf_counter() > end:
            break
        for name, contender in contenders.items():
            found[name] += contender.turn()
    return found


def compare(
    model: YOLOv7, size: int, pace: Pace, *, compiled: bool = True, beside: Sequence[int] = ()
) -> Iterator[Row]:
    """A row for each contender, and one for each beside each neighbour.

    Args:
        model: In deploy form.
        size: Side of the image in pixels.
        pace: How long the turns may take.
        compiled: Ours by torch.compile too, which takes a minute to start.
        beside: Niceness of the neighbours.
    """
    flops = sum(layer.flops for layer in conv_layers(fresh(model).fuse(), size, size))
    case = f"{model.variant.name}, {size} px"
    work = Work(flops, items=1)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        running = {
            name: stack.enter_context(Contender(make, torch.get_num_threads()))
            for name, make in makers(model, size, folder, compiled=compiled).items()
        }
        able = {name: one for name, one in running.items() if isinstance(one.result, Tensor)}
        for name, one in able.items():  # validated before they are timed
            close(TOLERANCE.get(name.rpartition(", ")[2], 1e-4))(one.result, able[OURS].result)
        for name, seconds in race(able, pace).items():
            yield Row.of("peers", case, name, seconds, work)
        for niceness in beside:
            with neighbour(niceness):
                for name, seconds in race(able, pace).items():
                    yield Row.of("peers", f"{case}, neighbour {niceness}", name, seconds, work)
        for name, one in running.items():
            if isinstance(one.result, Missing):
                yield Row("peers", case, name, missing=one.result.reason)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare, print the table, and keep the rows."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--variant", nargs="+", default=["yolov7-tiny", "yolov7"])
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--seconds", type=float, default=30.0, help="of each variant")
    parser.add_argument("--quick", action="store_true", help="without torch.compile")
    parser.add_argument("--neighbour", nargs="*", type=int, default=[], metavar="NICE")
    parser.add_argument("--save", action="store_true", help="keep the rows")
    options = parser.parse_args(arguments)
    pace = Pace(options.seconds)
    torch.manual_seed(0)
    models = [create_model(variant, form="deploy").eval() for variant in options.variant]
    rows = [
        row
        for model in models
        for row in compare(
            model,
            options.imgsz,
            pace,
            compiled=not options.quick,
            beside=options.neighbour,
        )
    ]
    Console(width=120).print(comparison_table(rows), *left_out(rows), sep="\n")
    if options.save:
        with atomic(KEPT) as temporary:
            temporary.write_text(Report.of(torch.device("cpu"), rows, {}).as_json())
    return 0


if __name__ == "__main__":
    sys.exit(main())
