"""`yolov7 train`: train a model, or go on with a run."""

import os
from dataclasses import asdict

from yolov7.errors import UserError
from yolov7.runs import check_writable, write_json
from yolov7.train.loop import train
from yolov7.train.options import Train
from yolov7.train.report import Result

__all__ = ["Train", "run"]


def run(options: Train) -> int:
    """Train as the options say; returns the exit code."""
    main = int(os.environ.get("RANK", "0")) == 0
    if main:
        check_writable(options.json)
    try:
        result = train(options)
    except OSError as error:  # a full disk, a folder that went away
        where = f"{error.filename}: " if error.filename else ""
        raise UserError(f"{where}{error.strerror or error}") from None
    if main:
        report(result)
        write_json(options.json, asdict(result) | {"folder": str(result.folder)})
    return 0


def report(result: Result) -> None:
    """Print how a run ended and where its weights are."""
    print(f"{result.stopped}: {result.epochs} epochs in {result.hours:.2f} hours")
    best = result.folder / "weights" / "best.safetensors"
    if best.exists():
        ap = f"AP {result.stats['AP']:.4f}"
        ap += f", on test {result.test['AP']:.4f}" if result.test else ""
        print(f"best model: {best} (epoch {result.best_epoch}, {ap})")
    print(f"last model: {result.folder / 'weights' / 'last.safetensors'}")
