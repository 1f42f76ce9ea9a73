"""`yolov7 val`: how accurate a model is on a data set."""

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from yolov7.checkpoint import in_words
from yolov7.cli.options import ModelOptions
from yolov7.dataset import Dataset, load_data
from yolov7.drawing import NO_PLOTS, can_plot
from yolov7.engine.choose import AnyNetwork, fit, open_network
from yolov7.engine.exported import ExportedNetwork
from yolov7.errors import UserError, at_least_one
from yolov7.evaluate import Evaluation, Predictions, Settings, coco_results, measure, predict
from yolov7.evaluate.run import EVERYTHING, Preparation
from yolov7.evaluate.sheet import draw_sheet
from yolov7.evaluate.table import class_table
from yolov7.progress import working
from yolov7.results import write_image
from yolov7.runs import check_writable, new_run, write_arguments, write_json
from yolov7.text import printable

LISTED = 10  # of what is left out, named on the terminal
# figure -> kind, letters, IoU, area, detections: the block that pycocotools prints
COCO_BLOCK = {
    "AP": ("Precision", "AP", "0.50:0.95", "all", 100),
    "AP50": ("Precision", "AP", "0.50", "all", 100),
    "AP75": ("Precision", "AP", "0.75", "all", 100),
    "APs": ("Precision", "AP", "0.50:0.95", "small", 100),
    "APm": ("Precision", "AP", "0.50:0.95", "medium", 100),
    "APl": ("Precision", "AP", "0.50:0.95", "large", 100),
    "AR1": ("Recall", "AR", "0.50:0.95", "all", 1),
    "AR10": ("Recall", "AR", "0.50:0.95", "all", 10),
    "AR100": ("Recall", "AR", "0.50:0.95", "all", 100),
}


@dataclass(kw_only=True)
class Val(ModelOptions):
    """Measure a model's accuracy on a data set, with pycocotools."""

    data: str
    """data.yaml, a folder with one, a COCO json, or coco (read from $YOLOV7_DATASETS/coco, else
    datasets/coco)"""
    split: str = "val"
    """train, val, test, or another key of the data.yaml"""
    conf: float = 0.001
    """confidence that a detection must exceed"""
    iou: float = 0.65
    """IoU with a better detection of its class above which one is dropped"""
    max_det: int = 300
    """detections per image"""
    batch: int | None = None
    """images at a time; the result does not depend on it (default: 32 on a GPU, 4 on a CPU,
    which more does not make faster)"""
    preparation: Preparation = "authors"
    """canvas of the images: authors, as for the published figures; letterbox, the smallest for
    each; square, imgsz x imgsz"""
    project: Path = Path("runs/val")
    """folder of the run folders"""
    name: str | None = None
    """run folder (default: the next number)"""
    save_json: bool = False
    """write all detections in COCO's form to predictions.json in the run folder"""
    json: Path | None = None
    """write the result to this file"""


def run(options: Val) -> int:
    """Evaluate, print, and write the run folder; 1 if images had to be left out."""
    suppression = replace(EVERYTHING, conf=options.conf, iou=options.iou, max_det=options.max_det)
    if options.batch is not None:
        at_least_one("batch", options.batch)
    network = open_network(options.runtime())
    imgsz, preparation = _preparation(options, network)
    dataset = _matched(load_data(options.data, options.split), network.names)
    if not dataset.boxes:
        raise UserError(
            f"{options.data} {options.split}: {dataset.summary()}: nothing to compare with; check "
            f"where the labels of {dataset.samples[0].path} lie"
        )
    weights = in_words(options.weights)
    settings = Settings(
        imgsz=imgsz,
        batch=options.batch or (32 if network.device.type == "cuda" else 4),
        suppression=suppression,
        preparation=preparation,
    )
    how = f"{network.device}, {network.precision}, {network.engine}"
    print(f"{weights}: {network.title}; {how}")
    print(f"{options.data} {options.split}: {dataset.summary()}, {settings.imgsz} px")

    check_writable(options.json)
    folder = new_run(options.project, options.name)
    predictions = predict(network, dataset, settings)
    dataset = predictions.dataset
    with working("comparing with the labels"):
        evaluation = measure(dataset, predictions.detections, predictions.speed)
    _print(evaluation)
    _save(options, predictions, evaluation, folder)
    print(f"results in {folder}")
    _list("skipped", dataset.skipped)
    _list("left out", dataset.problems)
    return 1 if dataset.skipped else 0


def _preparation(options: Val, network: AnyNetwork) -> tuple[int, Preparation]:
    """The images' longer side in pixels and how they are prepared, as far as a file allows."""
    if not isinstance(network, ExportedNetwork):
        return fit(options.imgsz, network)[0], options.preparation
    height, width = network.imgsz
    if height != width:
        raise UserError(f"{options.weights}: takes {height} x {width} pixels; val needs a square")
    if options.preparation != "square":
        print(f"note: {options.weights} takes one size only: preparation square", file=sys.stderr)
    if network.metadata.nms is not None:
        conf = network.metadata.nms.conf
        print(
            f"note: {options.weights} drops what is below confidence {conf} by itself, and all "
            "but a box's best class: its AP is lower than that of --nms none",
            file=sys.stderr,
        )
    return height, "square"


def _matched(dataset: Dataset, names: list[str]) -> Dataset:
    """The data set with its classes as the weights count them: by name, else by position."""
    if len(names) != len(dataset.names):
        raise UserError(
            f"the weights know {len(names)} classes ({_some(names)}), the data set has "
            f"{len(dataset.names)} ({_some(dataset.names)}): give weights that were trained on it"
        )
    if names == dataset.names:
        return dataset
    matched = dataset.matched(names)
    if matched is not dataset:
        print("note: the weights count the classes in another order: matched by name")
        return matched
    print(
        f"note: the weights call their classes {_some(names)}, "
        f"the data set {_some(dataset.names)}; taken in this order",
        file=sys.stderr,
    )
    return dataset


def _some(names: list[str]) -> str:
    return printable(", ".join(names[:4])) + (", ..." if len(names) > 4 else "")


def _print(evaluation: Evaluation) -> None:
    """The COCO block, the table of classes and the speed."""
    stats = evaluation.stats
    for figure, (kind, letters, iou, area, detections) in COCO_BLOCK.items():
        title = f"Average {kind}"
        print(
            f" {title:<18} ({letters}) @[ IoU={iou:<9} | area={area:>6} | "
            f"maxDets={detections:>3} ] = {stats[figure]:.3f}"
        )
    Console(markup=False).print(class_table(evaluation))
    stages = ", ".join(f"{name} {value:.1f}" for name, value in evaluation.speed.items())
    print(f"speed in ms per image: {stages}")


def _save(options: Val, predictions: Predictions, evaluation: Evaluation, folder: Path) -> None:
    """Write the run folder, and the result where `--json` wants it."""
    dataset, detections = predictions.dataset, predictions.detections
    write_arguments(folder, asdict(options))
    for path in (folder / "results.json", options.json):
        write_json(path, evaluation.to_dict())
    if options.save_json:
        found = coco_results(dataset.samples, detections, dataset.category_ids)
        write_json(folder / "predictions.json", found, indent=None)
    sheet = draw_sheet(dataset.samples, detections, dataset.names)
    write_image(folder / "samples.jpg", sheet)
    if not can_plot():
        print(f"note: {NO_PLOTS}")
        return
    from yolov7.evaluate.pictures import save_pictures  # needs matplotlib

    save_pictures(evaluation, folder)


def _list(title: str, lines: Sequence[object]) -> None:
    for line in lines[:LISTED]:
        print(f"{title}: {line}", file=sys.stderr)
    if len(lines) > LISTED:
        print(f"{title}: {len(lines) - LISTED} more", file=sys.stderr)
