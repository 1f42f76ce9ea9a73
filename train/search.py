"""The search for hyper-parameters: many runs, each where those before say that it may pay.

Optuna (the extra `search`) draws them by its tree-structured Parzen estimator, the preset's own
first, and ends early what falls behind the median of the others. A folder holds a search: a journal
of what was tried, to which several processes may add at the same time; a folder and a text for
every trial; a table of all. Only the best trial's weights are kept.
"""

import contextlib
import csv
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from math import nan
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yolov7.atomic import atomic
from yolov7.errors import UserError, at_least_one, first_line
from yolov7.runs import new_run
from yolov7.schema import from_json
from yolov7.train.config import SHARES, HyperParameters
from yolov7.train.data import read_splits
from yolov7.train.loop import train
from yolov7.train.model import build_model
from yolov7.train.options import Train, check_numbers, given_anew, hyper_parameters
from yolov7.train.report import Callback
from yolov7.train.state import LAST, PREVIOUS
from yolov7.train.step import DivergedError
from yolov7.train.validation import Validation, fitness

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

Ranges = Mapping[str, tuple[float, float]]
JOURNAL, TABLE = "journal.log", "trials.csv"
# Where is looked if nothing is said: around the preset's number, and between these.
AROUND = {"lr0": 5.0, "weight_decay": 5.0, "box": 2.5, "obj": 2.5, "cls": 2.5}
BETWEEN = {"scale": (0.0, 0.9), "translate": (0.0, 0.3), "mosaic": (0.0, 1.0), "mixup": (0.0, 0.3)}
BY_CHANCE = 8  # trials before the estimator takes over, and before any is ended early
ANEW = ("data", "device", "workers", "cache", "kernels")  # may be given to a search that goes on


@dataclass(frozen=True)
class Tried:
    """One trial.

    Args:
        number: of its folder, and of `NUMBER.log` beside it.
        state: complete, pruned (ended early), diverged, failed or running.
        fitness: 0.1 AP50 + 0.9 AP of its best epoch; 0 if it diverged, NaN where there is none.
        values: of the hyper-parameters that are searched.
    """

    number: int
    state: str
    fitness: float
    values: dict[str, float]


@dataclass(frozen=True)
class Found:
    """What a search has come to.

    Args:
        folder: of the search.
        best: number of the best trial.
        fitness: of that trial.
        values: its hyper-parameters, as `Train.set` takes them.
        trials: all, in their order.
    """

    folder: Path
    best: int
    fitness: float
    values: dict[str, float]
    trials: list[Tried]


class Follower(Callback):
    """Tells Optuna how a trial goes, and ends it where it falls behind the others."""

    def __init__(self, trial: "Trial") -> None:
        self.trial = trial
        self.best = 0.0

    def on_epoch(self, row: dict[str, float], validation: Validation | None) -> None:
        """Compare."""
        if validation is not None:
            self.best = max(self.best, fitness(validation.stats))
            self.trial.report(self.best, int(row["epoch"]))
            if self.trial.should_prune():
                self.stop = "behind the others"


def search(options: Train, trials: int, ranges: Ranges | None = None) -> Found:
    """Try hyper-parameters until so many trials are done.

    Args:
        options: of every trial, its seed too; the folder of the search is made in `project`.
            `resume` names that of one that goes on with its own options, of which those about the
            machine and the place of the data may be given anew.
        trials: that are done in the end, those of before and of other processes among them.
        ranges: lowest and highest value of each hyper-parameter to search; None: the learning rate,
            weight decay and gains around the preset's, scale, shift, mosaics and mixup.

    Raises:
        UserError: Optuna is missing; the options, the data or the ranges cannot be used; a trial
            fails otherwise than by diverging.
    """
    at_least_one("trials", trials)
    if find_spec("optuna") is None:
        raise UserError("searching needs Optuna: pip install 'yolov7-triton[search]'")
    if options.export is not None:
        raise UserError("--export: train with what is found, and export that")
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise UserError("a search is one process: start another beside it with --resume FOLDER")
    check_numbers(options)
    if options.resume is None:
        data = read_splits(options)
        study, folder, options, ranges = _begin(options, ranges)
    else:
        study, folder, options, ranges = _go_on(options)
        data = read_splits(options)
    print(f"searching {', '.join(ranges)} in {folder}", flush=True)
    while len(_done(study)) < trials:
        trial = _next(study, options.seed)
        values = {
            name: trial.suggest_float(name, *ends, log=ends[0] > 0 and name not in SHARES)
            for name, ends in ranges.items()
        }
        with _told(study, trial) as follower, _said_to(folder / f"{trial.number}.log"):
            place = replace(options, data="", project=str(folder), name=str(trial.number))
            train(replace(place, set=options.set | values), [follower], data=data)
        found = _found(study, folder)
        _write_table(found)
        _keep_best(found)
        tried = found.trials[trial.number]
        said = ", ".join(f"{name} {value:.3g}" for name, value in values.items())
        print(
            f"trial {tried.number}: {tried.state}, fitness {tried.fitness:.4f} with {said}; the "
            f"best is trial {found.best} with {found.fitness:.4f}",
            flush=True,
        )
    return _found(study, folder)


def _study(folder: Path, *, new: bool) -> "Study":
    """The study whose journal lies in a folder."""
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / JOURNAL))),
        study_name="search",
        direction="maximize",
        pruner=optuna.pruners.MedianPruner(n_startup_trials=BY_CHANCE, n_warmup_steps=5),
        load_if_exists=not new,
    )


def _begin(options: Train, ranges: Ranges | None) -> tuple["Study", Path, Train, Ranges]:
    """A new search: its study, its folder, and what a trial is."""
    hyper = hyper_parameters(options, build_model(options, classes=1).variant)
    ranges = ranges or _usual_ranges(hyper)
    _check(ranges)
    folder = new_run(Path(options.project), options.name)
    study = _study(folder, new=True)
    options = replace(options, json=None, name=None)
    study.set_user_attr("options", asdict(options))
    study.set_user_attr("ranges", {name: list(ends) for name, ends in ranges.items()})
    usual = _flat(hyper)
    study.enqueue_trial(
        {name: min(max(usual[name], low), high) for name, (low, high) in ranges.items()}
    )
    return study, folder, options, ranges


def _go_on(given: Train) -> tuple["Study", Path, Train, Ranges]:
    """A search that goes on."""
    folder = Path(given.resume or "")
    if not (folder / JOURNAL).is_file():
        raise UserError(f"{folder}: no search: there is no {JOURNAL}")
    try:
        study = _study(folder, new=False)
        saved = from_json(Train, study.user_attrs["options"])
        ranges = {name: (low, high) for name, (low, high) in study.user_attrs["ranges"].items()}
        _check(ranges)
    except Exception as error:  # whatever Optuna makes of what anyone may have written
        why = first_line(error)
        raise UserError(f"{folder / JOURNAL}: no journal of a search: {why}") from None
    anew = given_anew(given, asdict(saved), ANEW, "search", "a new one")
    return study, folder, replace(saved, **anew), ranges


def _usual_ranges(hyper: HyperParameters) -> dict[str, tuple[float, float]]:
    values = _flat(hyper)
    around = {name: (values[name] / times, values[name] * times) for name, times in AROUND.items()}
    return {name: ends for name, ends in around.items() if values[name]} | BETWEEN


def _flat(hyper: HyperParameters) -> dict[str, float]:
    """Hyper-parameters by name; one that is None is taken for 0."""
    values = asdict(hyper)
    values |= values.pop("augmentation")
    return {name: value or 0.0 for name, value in values.items()}


def _check(ranges: Ranges) -> None:
    """Refuse what is no range of a hyper-parameter."""
    for name, (low, high) in ranges.items():
        for value in (low, high):
            HyperParameters().with_values({name: value})
        if not low < high < float("inf"):
            raise UserError(f"--search {name} {low:g} {high:g}: give the lower end first")


def _next(study: "Study", seed: int) -> "Trial":
    """The next trial, the same whether the search was interrupted before it or not."""
    from optuna.samplers import TPESampler

    study.sampler = TPESampler(seed=seed + len(study.trials), n_startup_trials=BY_CHANCE)
    return study.ask()


@contextlib.contextmanager
def _told(study: "Study", trial: "Trial") -> Iterator[Follower]:
    """Tell the study how a trial ends; one that diverges is the worst, and no error."""
    from optuna.trial import TrialState

    follower = Follower(trial)
    try:
        yield follower
    except DivergedError:
        trial.set_user_attr("diverged", True)
        study.tell(trial, 0.0)
    except BaseException:
        study.tell(trial, state=TrialState.FAIL)
        raise
    else:
        if follower.stop:
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, follower.best)


@contextlib.contextmanager
def _said_to(path: Path) -> Iterator[None]:
    """What is printed goes into a file."""
    with path.open("w", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        yield


def _done(study: "Study") -> list["FrozenTrial"]:
    from optuna.trial import TrialState

    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def _found(study: "Study", folder: Path) -> Found:
    trials = [_tried(trial) for trial in study.get_trials(deepcopy=False)]
    best = study.best_trial
    return Found(folder, best.number, float(best.value or 0.0), dict(best.params), trials)


def _tried(trial: "FrozenTrial") -> Tried:
    state = "diverged" if trial.user_attrs.get("diverged") else trial.state.name.lower()
    state = {"fail": "failed"}.get(state, state)
    reached = (
        trial.value
        if trial.value is not None
        else max(trial.intermediate_values.values(), default=nan)
    )
    return Tried(trial.number, state, reached, dict(trial.params))


def _write_table(found: Found) -> None:
    names = list(found.values)
    with atomic(found.folder / TABLE) as temporary, temporary.open("w", newline="") as file:
        writer: Any = csv.writer(file)
        writer.writerow(["trial", "state", "fitness", *names])
        for tried in found.trials:
            cells = [f"{tried.values[name]:.6g}" if name in tried.values else "" for name in names]
            reached = "" if tried.fitness != tried.fitness else f"{tried.fitness:.6f}"  # NaN
            writer.writerow([tried.number, tried.state, reached, *cells])


def _keep_best(found: Found) -> None:
    """Remove the weights and the states of all finished trials but the best."""
    for tried in found.trials:
        folder = found.folder / str(tried.number)
        if tried.state == "running":
            continue
        for name in (LAST, PREVIOUS):
            (folder / name).unlink(missing_ok=True)
        if tried.number != found.best:
            shutil.rmtree(folder / "weights", ignore_errors=True)
