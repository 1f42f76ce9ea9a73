"""`python -m bench.peers`: our CPU engines beside ONNX Runtime and OpenVINO, in one run.

The peers run the ONNX file that `yolov7 export` writes, with as many threads as PyTorch has. One
that is not installed is left out, and said. Batch 1, dense decoded boxes, no suppression anywhere.
int8 is calibrated on the one image by `yolov7.engine.graph.calibrate`; the peers run the int8 file
of `yolov7 export`, and ONNX Runtime also what its own static quantisation makes of the other. The
peers' threads spin for a while when their turn is over, which slows whoever is next where cores are
few: time one alone before you trust a difference.

`--neighbour 0` (its niceness) also times each beside a process that never rests, as on a machine
that others use. Set `GOMP_SPINCOUNT=1000` for it, as the `yolov7` commands do.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from bench.comparison import Missing, close
from bench.eight_bits import calibrated, quantised
from bench.results import OURS, Row, comparison_table, left_out
from yolov7.benchmark.clock import Clock, Pace, Run, Work, race
from yolov7.engine.choose import Runtime, open_network
from yolov7.errors import UserError
from yolov7.export import Settings, export
from yolov7.layers import conv_layers
from yolov7.model import YOLOv7, create_model

TOLERANCE = {"bf16": 2e-2, "int8": 0.2}  # int8 of random weights; what AP loses is measured


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


def contenders(model: YOLOv7, size: int, *, compiled: bool) -> dict[str, Run | Missing]:
    """Forwards of one random image; ours in eager fp32 is what the others are held against."""
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    found = {OURS: ours(model, x, "fp32", "eager"), "ours, bf16": ours(model, x, "bf16", "eager")}
    found["ours, int8"] = ours(calibrated(model, x), x, "int8", "eager")
    if compiled:
        found["ours, compile"] = ours(model, x, "fp32", "compile")
        found["ours, compile, bf16"] = ours(model, x, "bf16", "compile")
    with tempfile.TemporaryDirectory() as folder:
        path, narrow = Path(folder) / "fp32.onnx", Path(folder) / "int8.onnx"
        with redirect_stdout(sys.stderr):
            export(model, path, Settings(imgsz=(size, size)))
            export(model, narrow, Settings(imgsz=(size, size), precision="int8"))
        found["onnxruntime"] = onnxruntime(path, x)
        found["onnxruntime, int8"] = onnxruntime(narrow, x)
        if find_spec("onnxruntime"):
            found["onnxruntime's own, int8"] = onnxruntime(quantised(path, x), x)
        for precision in ("fp32", "bf16"):
            found[f"openvino, {precision}"] = openvino(path, x, precision)
        found["openvino, int8"] = openvino(narrow, x, "fp32")
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


def compare(
    model: YOLOv7, size: int, pace: Pace, *, compiled: bool = True, beside: Sequence[int] = ()
) -> Iterator[Row]:
    """A row for each contender, and one for each beside each neighbour.

    Args:
        model: In deploy form.
        size: Side of the image in pixels.
        pace: How long it may take.
        compiled: Ours by torch.compile too, which takes a minute to start.
        beside: Niceness of the neighbours.
    """
    found = contenders(model, size, compiled=compiled)
    runs = {name: run for name, run in found.items() if not isinstance(run, Missing)}
    expected = runs[OURS]()
    for name, run in runs.items():  # validated before they are timed
        precision = name.rpartition(", ")[2]
        close(TOLERANCE.get(precision, 1e-4))(run(), expected)
    flops = sum(layer.flops for layer in conv_layers(fresh(model).fuse(), size, size))
    case = f"{model.variant.name}, {size} px"
    clock, work = Clock(torch.device("cpu")), Work(flops, items=1)
    for name, seconds in race(runs, clock, pace).items():
        yield Row.of("peers", case, name, seconds, work)
    for niceness in beside:
        with neighbour(niceness):
            for name, seconds in race(runs, clock, pace).items():
                yield Row.of("peers", f"{case}, neighbour {niceness}", name, seconds, work)
    for name, other in found.items():
        if isinstance(other, Missing):
            yield Row("peers", case, name, missing=other.reason)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compare and print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--variant", nargs="+", default=["yolov7-tiny", "yolov7"])
    parser.add_argument("--imgsz", type=int, default=640)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each variant")
    parser.add_argument("--quick", action="store_true", help="without torch.compile")
    parser.add_argument("--neighbour", nargs="*", type=int, default=[], metavar="NICE")
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
    return 0


if __name__ == "__main__":
    sys.exit(main())
