"""`python -m bench.peers`: our CPU engines beside ONNX Runtime and OpenVINO, in one run.

The peers run the ONNX file that `yolov7 export` writes, each as it comes: OpenVINO computes in bf16
where the processor has it, so ours in bf16 is there too. One that is not installed is left out, and
said. Batch 1, dense decoded boxes, no suppression anywhere.
"""

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from bench.race import OURS, Clock, Missing, Pace, Run, Work, close, race
from bench.results import Row, comparison_table
from yolov7.errors import UserError
from yolov7.export import Settings, export
from yolov7.exported import ExportedNetwork
from yolov7.info import conv_layers
from yolov7.model import YOLOv7, create_model
from yolov7.network import Network


def contenders(model: YOLOv7, size: int, *, compiled: bool) -> dict[str, Run | Missing]:
    """Forwards of one random image; ours in eager fp32 is what the others are held against."""
    x = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    found: dict[str, Run | Missing] = {}

    def add(name: str, network: Network | ExportedNetwork) -> None:
        found[name] = partial(network, x)

    add(OURS, Network(fresh(model), device="cpu", precision="fp32", engine="eager"))
    add("ours, bf16", Network(fresh(model), device="cpu", precision="bf16", engine="eager"))
    try:
        if compiled:
            add("ours, compile", Network(fresh(model), device="cpu", engine="compile"))
    except UserError as error:
        found["ours, compile"] = Missing(str(error))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        for name, engine in (("onnxruntime", "auto"), ("openvino", "openvino")):
            try:
                if not path.exists():
                    with redirect_stdout(sys.stderr):
                        export(model, path, Settings(imgsz=(size, size)))
                add(name, ExportedNetwork(path, device="cpu", engine=engine))
            except UserError as error:
                found[name] = Missing(str(error))
    return found


def fresh(model: YOLOv7) -> YOLOv7:
    """A copy, since a network takes its model over."""
    copy = YOLOv7(model.variant, model.head.num_classes, "deploy")
    copy.load_state_dict(model.state_dict())
    return copy.eval()


def compare(model: YOLOv7, size: int, pace: Pace, *, compiled: bool = True) -> Iterator[Row]:
    """A row for each contender.

    Args:
        model: In deploy form.
        size: Side of the image in pixels.
        pace: How long it may take.
        compiled: Ours by torch.compile too, which takes a minute to start.
    """
    found = contenders(model, size, compiled=compiled)
    runs = {name: run for name, run in found.items() if not isinstance(run, Missing)}
    expected = runs[OURS]()
    for name, run in runs.items():  # validated before they are timed
        close(2e-2 if name in ("openvino", "ours, bf16") else 1e-4)(run(), expected)
    flops = sum(layer.flops for layer in conv_layers(fresh(model).fuse(), size, size))
    case = f"{model.variant.name}, {size} px"
    for name, seconds in race(runs, Clock(torch.device("cpu")), pace).items():
        yield Row.of("peers", case, name, seconds, Work(flops, items=1))
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
    options = parser.parse_args(arguments)
    pace = Pace(options.seconds)
    torch.manual_seed(0)
    models = [create_model(variant, form="deploy").eval() for variant in options.variant]
    rows = [
        row
        for model in models
        for row in compare(model, options.imgsz, pace, compiled=not options.quick)
    ]
    Console(width=120).print(comparison_table(rows))
    for reason in sorted({f"{row.body}: {row.missing}" for row in rows if row.missing}):
        print("left out:", reason)
    return 0


if __name__ == "__main__":
    sys.exit(main())
