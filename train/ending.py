"""What a run ends with: its best weights evaluated and pictured, and written in another format.

All of it follows from the run's folder and its data, so `--resume` makes what is missing.
"""

import copy
import json
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from yolov7.checkpoint import load_model
from yolov7.dataset import Dataset, load_data
from yolov7.dataset.reader import known_splits
from yolov7.dataset.split import shared_images
from yolov7.errors import UserError
from yolov7.evaluate.table import class_table
from yolov7.formats import FORMATS
from yolov7.model import YOLOv7
from yolov7.runs import write_json
from yolov7.train.data import as_one_class
from yolov7.train.distributed import Ranks
from yolov7.train.options import EPOCHS, Train
from yolov7.train.plots import COURSE, evaluation_pictures
from yolov7.train.state import State
from yolov7.train.validation import Validation

FIGURES = "results.json"  # of the best weights, by split
Validate = Callable[[YOLOv7, Dataset], Validation]


def best_weights(folder: Path) -> Path:
    """The weights that a run has to show."""
    best, last = (folder / "weights" / f"{name}.safetensors" for name in ("best", "last"))
    return best if best.exists() else last


def exported_path(folder: Path, kind: str) -> Path:
    """Where the best weights are exported to; `best.onnx` beside them."""
    return best_weights(folder).with_suffix(FORMATS[kind].SUFFIX)


def check_unfinished(options: Train, state: State, *, plots: bool) -> None:
    """See whether there is something to do for a run that is resumed.

    Args:
        options: of the run.
        state: of the run.
        plots: whether pictures are drawn, too.

    Raises:
        UserError: it has done its epochs, and what comes after them.
    """
    folder, progress = Path(options.resume or ""), state["progress"]
    if progress["epoch"] < (EPOCHS if options.epochs is None else options.epochs):
        return
    try:
        shown = json.loads((folder / FIGURES).read_text())["epoch"]
    except (OSError, ValueError, KeyError, TypeError):  # not made, or half of it
        return
    exported = options.export is None or exported_path(folder, options.export).exists()
    drawn = not plots or (folder / COURSE).exists()
    if shown == progress["best_epoch"] and exported and drawn:
        raise UserError(
            f"{folder} has finished its {progress['epoch']} epochs: give more --epochs to go on"
        )


def evaluate_best(
    folder: Path,
    options: Train,
    epoch: int,
    train: Dataset,
    val: Validation | Dataset,
    model: YOLOv7,
    validate: Validate,
    ranks: Ranks,
    *,
    plots: bool,
) -> dict[str, Validation]:
    """Evaluate the best weights; the main process writes and prints what comes of it.

    Args:
        folder: of the run.
        options: the data, whose test split is looked at now for the first time.
        epoch: of the best weights.
        train: what was trained on, and is not to be in the test split.
        val: what their evaluation found, or the images, where this process has not made it.
        model: of the run, on its device; stays as it is.
        validate: evaluates a model on images.
        ranks: which process this is.
        plots: whether pictures are drawn, too.
    """
    found: dict[str, Validation] = {}
    data: dict[str, Dataset] = {}
    if isinstance(val, Validation):
        found["val"] = val
    else:
        data["val"] = val
    test, note = _test_images(options, train)
    ranks.say(note)
    if test is not None:
        data["test"] = test
    if data:
        best = copy.deepcopy(model)
        if ranks.main:  # the others get the tensors from it
            best.load_state_dict(load_model(best_weights(folder)).state_dict())
        found |= {split: validate(best, images) for split, images in data.items()}
    if ranks.main:
        figures = {split: validation.evaluation.to_dict() for split, validation in found.items()}
        for split, validation in found.items():
            Console().print(class_table(validation.evaluation, f"{split}, epoch {epoch}"))
            if plots:
                place = folder if split == "val" else folder / split
                place.mkdir(exist_ok=True)
                evaluation_pictures(validation, place)
        write_json(folder / FIGURES, {"epoch": epoch, **figures})
    return found


def _test_images(options: Train, train: Dataset) -> tuple[Dataset | None, str]:
    """The test split, if the data has one that can be evaluated, and what is to be said of it."""
    if not options.data or "test" in (options.split, options.val_split):
        return None, ""
    try:
        if "test" not in known_splits(options.data):
            return None, ""
        dataset = load_data(options.data, "test")
    except UserError as error:  # many a data.yaml names a folder that was never downloaded
        return None, f"not evaluated on test: {error}"
    dataset = as_one_class(dataset) if options.single_class else dataset.matched(train.names)
    if not dataset.boxes or dataset.names != train.names:
        return None, "not evaluated on test: it has no boxes, or other classes"
    if same := shared_images(train, dataset):
        return None, f"not evaluated on test: {len(same)} of its images were trained on"
    return dataset, ""


def export_best(folder: Path, kind: str) -> None:
    """Write the best weights in another format, and say what there is now.

    Raises:
        UserError: that cannot be done.
    """
    from yolov7.export import Settings, export  # two seconds, for torch.export

    path = exported_path(folder, kind)
    try:
        print(export(load_model(best_weights(folder)), path, Settings(kind=kind)), flush=True)
    except UserError as error:
        raise UserError(f"{error}; yolov7 train --resume {folder} tries it again") from None
