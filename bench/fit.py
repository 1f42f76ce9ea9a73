"""`python -m bench.fit CONFIGS`: the cost model beside what a GPU took, and numbers that fit it.

`CONFIGS` is a ``conv.json`` that `yolov7 tune` has written. Each of its launches is put beside the
model's interval, and of what the model takes for intervals the values are sought whose times come
nearest to the measured ones, by the sum of squared logarithms of the ratios: those to narrow the
intervals of `yolov7.kernels.architectures` and `yolov7.kernels.conv.model` around.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from yolov7.engine.graph.workload import workload
from yolov7.kernels.conv import ConvLaunch
from yolov7.kernels.conv.config import Entry, read_entries
from yolov7.kernels.conv.model import Corner, corners, timed
from yolov7.kernels.runtime import recording

FITTED = "l2", "memory", "step", "launch"
FACTORS = [4 ** (i / 20 - 1) for i in range(41)]  # a quarter to four times
SWEEPS = 6

Timed = tuple[str, float, Callable[[Corner], float]]
"""A launch's name, its measured seconds, and its modelled ones by the corner."""


def measured(entries: dict[Any, Entry], variant: str) -> Iterator[Timed]:
    """The launches of a variant that were timed with the config that a file has for them."""
    for precision in ("fp16", "fp8"):
        for batch in (1, 32):
            launches = workload(variant, batch, precision)["launches"]
            for launch in {launch.key: launch for launch in launches}.values():
                entry = entries.get(launch.key)
                if entry is not None and isinstance(launch, ConvLaunch):
                    seconds = timed(launch.calls, entry.config)
                    yield launch.name, entry.microseconds * 1e-6, seconds


def error(rows: Sequence[Timed], corner: Corner) -> float:
    """Root mean square of the logarithms of modelled over measured: 0.1 is about 10 %."""
    squares = (math.log(seconds(corner) / taken) ** 2 for _, taken, seconds in rows)
    return math.sqrt(sum(squares) / len(rows))


def fit(rows: Sequence[Timed], start: Corner) -> Corner:
    """The numbers whose times come nearest to the measured ones, one after the other."""
    best = start
    for _ in range(SWEEPS):
        for name in FITTED:
            value = getattr(start, name)
            tried = [best, *(best._replace(**{name: f * value}) for f in FACTORS)]
            best = min(tried, key=lambda corner: error(rows, corner))
    return best


def report(path: Path, variant: str = "yolov7") -> dict[str, Any]:
    """The launches beside the model, and the fitted numbers, as JSON values.

    Raises:
        ValueError: None of the variant's launches was timed.
    """
    capability = tuple(json.loads(path.read_text())["capability"])
    with recording(capability):
        rows, box = list(measured(read_entries(path), variant)), corners(torch.device("meta"))
    if not rows:
        raise ValueError(f"{path}: no launch of {variant} in it that this Triton was tuned with")
    middle = Corner(*(math.sqrt(min(v) * max(v)) for v in zip(*box, strict=True)))
    fitted = fit(rows, middle)
    table: list[dict[str, Any]] = []
    for name, taken, seconds in rows:
        times = list(map(seconds, box))
        table.append({"launch": name, "measured": taken, "modelled": [min(times), max(times)]})
    return {
        "launches": table,
        "inside": sum(r["modelled"][0] <= r["measured"] <= r["modelled"][1] for r in table),
        "intervals": {
            name: [min(values), max(values)]
            for name, values in zip(Corner._fields, zip(*box, strict=True), strict=True)
        },
        "fitted": fitted._asdict(),
        "error": {"middle": error(rows, middle), "fitted": error(rows, fitted)},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table, and write it as JSON."""
    parser = argparse.ArgumentParser(prog="python -m bench.fit", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("configs", type=Path)
    parser.add_argument("--variant", default="yolov7")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    try:
        found = report(options.configs, options.variant)
    except (OSError, ValueError, KeyError) as problem:
        parser.error(str(problem))
    for row in found["launches"]:
        low, high = (1e6 * s for s in row["modelled"])
        print(f"{1e6 * row['measured']:8.1f} us, modelled {low:.1f} to {high:.1f}: {row['launch']}")
    print(f"{found['inside']} of {len(found['launches'])} inside; fitted: {found['fitted']}")
    print(f"error {found['error']['middle']:.3f}, fitted {found['error']['fitted']:.3f}")
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
