"""`python -m bench.accuracy NAME OPTIONS`: evaluate weights and keep the figures under NAME.

OPTIONS are those of `yolov7 val`. ``bench/results/accuracy.json`` is given what was found, the
options (but for paths), and how the weights were trained where they say so. The table of
docs/accuracy.md is written from it by `python -m bench.tables`; runs that are named alike but for
their seed get a mean.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from bench.results import RESULTS, environment
from yolov7.atomic import atomic
from yolov7.checkpoint import read_metadata
from yolov7.cli import main as yolov7
from yolov7.train.options import Train

KEPT = RESULTS / "accuracy.json"
FIGURES = ("AP", "AP50", "AP75", "AR100")
PATHS = ("data", "weights", "project", "name", "json", "resume")  # of this machine
SEED = ", seed "

Figures = Mapping[str, Any]


def measured(options: Sequence[str]) -> dict[str, Any]:
    """What `yolov7 val` finds with these options, and what is to be known about it.

    Raises:
        SystemExit: it could not be evaluated.
    """
    parser = argparse.ArgumentParser(add_help=False)
    for name in PATHS:
        parser.add_argument(f"--{name}")
    paths, others = parser.parse_known_args(options)
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        if code := yolov7(["val", *options, "--project", folder, "--json", str(result)]):
            sys.exit(code)
        found = json.loads(result.read_text())
    return {
        **{name: found[name] for name in FIGURES},
        "classes": {row["name"]: row["AP"] for row in found["per_class"]},
        "options": others,
        "training": trained(paths.weights),
        **{k: v for k, v in environment(torch.device("cpu")).items() if k in ("commit", "date")},
    }


def trained(weights: str | None) -> dict[str, Any]:
    """The options of the training run that left these weights, as far as they are not defaults."""
    if weights is None or Path(weights).suffix != ".safetensors":
        return {}
    told = read_metadata(weights).get("training", {})
    usual = json.loads(json.dumps(asdict(Train())))
    return {k: v for k, v in told.items() if k not in PATHS and v != usual.get(k)}


def kept(path: Path = KEPT) -> dict[str, Figures]:
    """Everything that was kept, by name."""
    found: dict[str, Figures] = json.loads(path.read_text()) if path.exists() else {}
    return found


def table(rows: Mapping[str, Figures]) -> Iterator[str]:
    """Lines of Markdown: every row, behind the seeds of a run their mean."""
    yield f"| | {' | '.join(FIGURES)} |"
    yield "|---|" + "---|" * len(FIGURES)
    for name, row in rows.items():
        yield _line(name, row)
        run, seeded, _ = name.partition(SEED)
        runs = [other for other in rows if seeded and other.startswith(run + SEED)]
        if len(runs) > 1 and name == runs[-1]:
            mean = {figure: fmean(rows[other][figure] for other in runs) for figure in FIGURES}
            yield _line(f"{run}, mean", mean)


def _line(name: str, row: Figures) -> str:
    return f"| {name} | {' | '.join(f'{row[figure]:.5f}' for figure in FIGURES)} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Evaluate and keep."""
    parser = argparse.ArgumentParser(prog="python -m bench.accuracy", description=__doc__)
    parser.add_argument("name", help="what the figures are kept under")
    known, options = parser.parse_known_args(arguments)
    rows = {**kept(), known.name: measured(options)}
    with atomic(KEPT) as temporary:
        temporary.write_text(json.dumps(rows, indent=1) + "\n")
    print("\n".join(table(rows)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
