"""What a run leaves on the disk: its folder, what it was told, and its result."""

import json
from pathlib import Path
from typing import Any, Literal

import yaml

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


def write_arguments(folder: Path, arguments: dict[str, Any]) -> None:
    """Write what a verb was told to `arguments.yaml` in the folder of its run.

    Raises:
        UserError: It cannot be written.
    """
    plain = {key: str(v) if isinstance(v, Path) else v for key, v in arguments.items()}
    _write(folder / "arguments.yaml", yaml.safe_dump(plain, sort_keys=False))


def check_writable(path: str | Path | None) -> None:
    """See before the work whether its result can be written; what is there stays.

    Args:
        path: Of a file, whose folder is made where there is none; None: nowhere.

    Raises:
        UserError: It cannot be written.
    """
    if path is not None:
        path = Path(path)
        new = not path.exists()
        _write(path, "", mode="a")
        if new:
            path.unlink()


def write_json(path: str | Path | None, value: object, *, indent: int | None = 1) -> None:
    """Write a value as JSON.

    Args:
        path: Of the file, whose folder is made where there is none; None: nowhere.
        value: Of dicts, lists, strings and numbers.
        indent: Spaces per level; None: all on one line.

    Raises:
        UserError: It cannot be written.
    """
    if path is not None:
        _write(Path(path), json.dumps(value, indent=indent))


def _write(path: Path, text: str, *, mode: Literal["a", "w"] = "w") -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open(mode, encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from None


def _free_name(project: Path, name: str | None) -> str:
    taken = {path.name for path in project.iterdir()}
    if name is None:
        return str(1 + max((int(other) for other in taken if other.isdecimal()), default=0))
    number, free = 1, name
    while free in taken:
        number += 1
        free = f"{name}-{number}"
    return free
