"""`yolov7 tune-hyperparameters`: find what trains best on a data set."""

from dataclasses import asdict, dataclass, field

from rich.console import Console
from rich.table import Table

from yolov7.runs import check_writable, write_json
from yolov7.train.options import Train
from yolov7.train.search import TABLE, Found, search


@dataclass(kw_only=True)
class TuneHyperparameters(Train):
    """Try hyper-parameters, each in a training run; the other options are those of every run."""

    trials: int = 30
    """runs in all; the first has the preset's hyper-parameters"""
    search: dict[str, tuple[float, float]] = field(default_factory=dict)
    """ranges, as NAME LOW HIGH triples (default: learning rate, weight decay, the gains of the
    losses, scale, translate, mosaic and mixup)"""
    project: str = "runs/tune"
    """folder of the searches"""
    resume: str | None = None
    """folder of a search to go on with; also for a second process that joins in"""


def run(options: TuneHyperparameters) -> int:
    """Search, print the table and how to train with what was found."""
    check_writable(options.json)
    every = {k: v for k, v in vars(options).items() if k not in ("trials", "search")}
    if options.resume is not None:
        every["project"] = Train.project  # none is made
    found = search(Train(**every), options.trials, options.search or None)
    report(found)
    write_json(options.json, asdict(found) | {"folder": str(found.folder)})
    return 0


def report(found: Found) -> None:
    """Print the trials, the best first."""
    table = Table(title=f"trials of {found.folder}, the best first")
    for name in ("trial", "state", "fitness", *found.values):
        table.add_column(name, justify="right")
    ranked = sorted(found.trials, key=lambda tried: -tried.fitness if tried.fitness >= 0 else 1)
    for tried in ranked:
        cells = [f"{value:.3g}" for value in tried.values.values()]
        table.add_row(str(tried.number), tried.state, f"{tried.fitness:.4f}", *cells)
    Console().print(table)
    values = " ".join(f"{name} {value:.4g}" for name, value in found.values.items())
    print(f"all of them: {found.folder / TABLE}")
    print(f"train with the best: yolov7 train ... --set {values}")
