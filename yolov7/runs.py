"""The folder that a run writes into."""

from pathlib import Path

from yolov7.errors import UserError


def new_run(project: Path, name: str | None) -> Path:
    """Create the folder of a run.

    Args:
        project: Where runs of a kind are collected, such as `runs/val`.
        name: Of the folder; None: the number after the highest there. Where `name` is taken,
            `name-2` and so on: no run writes into another's folder.

    Raises:
        UserError: It cannot be created.
    """
    try:
        project.mkdir(parents=True, exist_ok=True)
        while True:
            folder = project / _free_name(project, name)
            try:
                folder.mkdir()
            except FileExistsError:  # another process was faster
                continue
            return folder
    except OSError as error:
        raise UserError(
            f"{project}: cannot be written ({error.strerror}): name another with --project"
        ) from None


def _free_name(project: Path, name: str | None) -> str:
    taken = {path.name for path in project.iterdir()}
    if name is None:
        return str(1 + max((int(other) for other in taken if other.isdecimal()), default=0))
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free
