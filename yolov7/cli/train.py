"""`yolov7 train`: train a model, or go on with a run."""

import json
import os
from dataclasses import asdict
from pathlib import Path

from yolov7.train.loop import train
from yolov7.train.options import Train
from yolov7.train.report import Result

__all__ = ["Train", "run"]


def run(options: Train) -> int:
    """Train as the options say; returns the exit code."""
    result = train(options)
    if int(os.environ.get("RANK", "0")) == 0:
        report(result)
        if options.json:
            fields = asdict(result) | {"folder": str(result.folder)}
            Path(options.json).write_text(json.dumps(fields, indent=2))
    return 0


def report(result: Result) -> None:
    """Print how a run ended and where its weights are."""
    print(f"{result.stopped}: {result.epochs} epochs in {result.hours:.2f} hours")
    best = result.folder / "weights" / "best.safetensors"
    if best.exists():
        print(f"best model: {best} (epoch {result.best_epoch}, fitness {result.fitness:.4f})")
    print(f"last model: {result.folder / 'weights' / 'last.safetensors'}")
