"""The table of an evaluation's classes, for a terminal."""

from rich.table import Table
from rich.text import Text

from yolov7.evaluate.metric import Evaluation
from yolov7.text import printable


def class_table(evaluation: Evaluation, data: str = "") -> Table:
    """Images, boxes and accuracy of all classes together and of each.

    Args:
        evaluation: What is shown.
        data: Of what, to begin the title with.
    """
    where = f"precision and recall at confidence {evaluation.confidence:.3f}, IoU 0.5"
    table = Table(title=f"{data}: {where}" if data else where)
    table.add_column("class")
    for column in ("images", "instances", "precision", "recall", "AP50", "AP"):
        table.add_column(column, justify="right")
    instances = sum(row.instances for row in evaluation.per_class)
    means = [evaluation.stats[name] for name in ("precision", "recall", "AP50", "AP")]
    table.add_row("all", str(evaluation.images), str(instances), *map(_figure, means))
    table.add_section()
    for row in evaluation.per_class:
        figures = map(_figure, (row.precision, row.recall, row.ap50, row.ap))
        table.add_row(Text(printable(row.name)), str(row.images), str(row.instances), *figures)
    return table


def _figure(value: float) -> str:
    return "-" if value < 0 else f"{value:.3f}"
