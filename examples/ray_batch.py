"""Boxes for a large collection, on every core or GPU of a Ray cluster, as Parquet.

    pip install 'ray[data]'
    python ray_batch.py s3://bucket/photos s3://bucket/boxes yolov7.pt

Each worker holds a Detector. The images of one that is lost go to another; a run that is started
again begins anew.
"""

import argparse
from typing import Any

import numpy as np
import ray

from yolov7 import Detector
from yolov7.items import find_items


class Finder:
    """A detector on one GPU, or on some cores: addresses of images to rows of boxes."""

    def __init__(self, weights: str, cores: int) -> None:
        import torch

        torch.set_num_threads(cores)  # Ray starts a worker for each share of the machine
        self.detector = Detector(weights, batch=8)

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        errors: list[Exception] = []
        rows = [
            (result.path, result.names[int(box.cls)], *box.data[0, :5].tolist(), "")
            for result in self.detector.stream(list(batch["item"]), on_error=errors.append)
            for box in result.boxes
        ]
        rows += [("", "", *[np.nan] * 5, str(error)) for error in errors]  # unreadable images
        names = ("path", "class", "x1", "y1", "x2", "y2", "confidence", "error")
        columns = list(zip(*rows, strict=True)) if rows else [()] * len(names)
        return {name: np.array(column) for name, column in zip(names, columns, strict=True)}


def main() -> None:
    """Read the command line, and detect."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", help="folder, pattern, .txt list, s3://, gs:// or hf:// address")
    parser.add_argument("output", help="folder of the Parquet files")
    parser.add_argument("weights", help="as of yolov7 predict --weights")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--gpus", type=float, default=0, help="of each worker")
    parser.add_argument("--cores", type=int, default=1, help="of each worker")
    chosen = parser.parse_args()
    names = [item.name for item in find_items(chosen.source)]
    ray.data.from_items(names).map_batches(
        Finder,
        fn_constructor_args=(chosen.weights, chosen.cores),
        batch_size=32,
        concurrency=chosen.workers,
        num_gpus=chosen.gpus,
        num_cpus=chosen.cores,
    ).write_parquet(chosen.output)


if __name__ == "__main__":
    main()
