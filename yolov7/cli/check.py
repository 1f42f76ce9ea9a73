"""`yolov7 check`: what is in a data set, and everything that is wrong with it."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from yolov7.atomic import atomic
from yolov7.dataset.check import NOTES, Report, check_data, per_class
from yolov7.drawing import NO_PLOTS, can_plot
from yolov7.engine.choose import fit
from yolov7.errors import UserError
from yolov7.runs import check_writable, write_json
from yolov7.text import file_name, printable
from yolov7.train.autoanchor import box_sizes, possible_recall
from yolov7.train.plots import label_picture
from yolov7.variants import VARIANTS, named

NAMED = 3  # problems of a kind that are named on the terminal


@dataclass(kw_only=True)
class Check:
    """Find everything that is wrong with a data set, at once."""

    data: str
    """data.yaml, a folder with one, a COCO json, a folder of COCO jsons, or coco"""
    split: tuple[str, ...] = ()
    """splits to look at (default: all)"""
    imgsz: int = 640
    """longer side in pixels at which the boxes are held against the anchors"""
    variant: str = "yolov7"
    """variant whose anchors these are"""
    all: bool = False
    """name every problem, not the first three of each kind"""
    pictures: Path | None = None
    """draw how many boxes there are, where and how large, into this folder: SPLIT.png"""
    json: Path | None = None
    """write splits, counts and all problems to this file"""


def run(options: Check) -> int:
    """Check, print what was found by kind; 1 if there are faults."""
    options = replace(options, imgsz=fit(options.imgsz, named(options.variant))[0])
    check_writable(options.json)
    report = check_data(options.data, options.split)
    console = Console(markup=False)
    for split, dataset in report.splits.items():
        print(f"{split}: {dataset.summary()}")
    _print_classes(report, console)
    _print_sizes(report, options)
    _print_problems(report, len(report.problems) if options.all else NAMED)
    write_json(options.json, report.to_dict())
    if options.pictures:
        _draw(report, options.pictures)
    return 1 if report.faults else 0


def _draw(report: Report, folder: Path) -> None:
    if not can_plot():
        raise UserError(NO_PLOTS)
    for split, dataset in report.splits.items():
        with atomic(folder / f"{file_name(split)}.png") as temporary:
            label_picture(dataset, temporary)


def _print_classes(report: Report, console: Console) -> None:
    table = Table(title="boxes of each class")
    table.add_column("class")
    counts = {}
    for split, dataset in report.splits.items():
        table.add_column(split, justify="right")
        counts[split] = dict(zip(dataset.names, per_class(dataset), strict=True))
    for name in dict.fromkeys(name for row in counts.values() for name in row):
        cells = [str(row.get(name, "-")) for row in counts.values()]
        table.add_row(Text(printable(name)), *cells)
    console.print(table)


def _print_sizes(report: Report, options: Check) -> None:
    anchors = np.array(VARIANTS[options.variant].anchors, np.float64).reshape(-1, 2)
    for split, dataset in report.splits.items():
        sizes = box_sizes(dataset.samples, options.imgsz)
        if len(sizes):
            small, middle, large = np.percentile(np.sqrt(sizes.prod(1)), (5, 50, 95))
            print(
                f"{split}: boxes of {small:.0f}, {middle:.0f} and {large:.0f} pixels "
                f"(5, 50 and 95 % are smaller) at {options.imgsz}; the anchors of "
                f"{options.variant} reach {possible_recall(sizes, anchors):.1%} of them"
            )


def _print_problems(report: Report, named: int) -> None:
    for kind, found in report.by_kind().items():
        print(f"{'note' if kind in NOTES else 'fault'}: {kind}: {len(found)}")
        for problem in found[:named]:
            print(f"  {problem}")
        if len(found) > named:
            print(f"  and {len(found) - named} more: --all names them, --json FILE writes them")
    print(f"{report.faults} faults" if report.faults else "no faults")
