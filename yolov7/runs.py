"""What a run leaves on the disk: its folder, what it was told, and its result."""

import json
from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any

import yaml

from yolov7.atomic import atomic
from yolov7.errors import UserError

ARGUMENTS = "arguments.yaml"


def new_run(project: Path, name: str | None) -> Path:
    """Create the folder of a run.

    Args:
        project: Where runs of a kind are collected, such as `runs/val`.
        name: Of the folder; None: the number after the highest there. Where `name` is taken,
            `name-2` and so on: no run writes into another's folder.

    Raises:
        UserError: It cannot be created, or `name` is not the name of a folder.
    """
    if name is not None and (name in ("", ".", "..") or "\0" in name or Path(name).name != name):
        raise UserError(
            f"--name {name!r}: give the plain name of a folder, or leave it out for the next "
            "number; where the folder lies is --project"
        )
    try:
        project.mkdir(parents=True, exist_ok=True)
        for candidate in _candidates(project, name):
            folder = project / candidate
            try:
                folder.mkdir()
            except FileExistsError:  # by another process, too, or by a name in other case
                continue
            return folder
    except OSError as error:
        raise UserError(
            f"{project}: cannot be written ({error.strerror}): name another with --project"
        ) from None
    raise AssertionError("candidates never end")


def _candidates(project: Path, name: str | None) -> Iterator[str]:
    """Names of a run's folder without end, the best first."""
    if name is not None:
        yield name
        yield from (f"{name}-{number}" for number in count(2))
    taken = [int(path.name) for path in project.iterdir() if path.name.isdecimal()]
    yield from map(str, count(1 + max(taken, default=0)))


def remove_empty(folder: Path) -> None:
    """Remove the folder of a run that has left nothing but what it was told."""
    if [path.name for path in folder.iterdir()] in ([], [ARGUMENTS]):
        (folder / ARGUMENTS).unlink(missing_ok=True)
        folder.rmdir()


def write_arguments(folder: Path, arguments: dict[str, Any]) -> None:
    """Write what a verb was told to `arguments.yaml` in the folder of its run.

    Raises:
        UserError: It cannot be written.
    """
    plain = {key: str(v) if isinstance(v, Path) else v for key, v in arguments.items()}
    _write(folder / ARGUMENTS, yaml.safe_dump(plain, sort_keys=False))


def check_writable(path: str | Path | None) -> None:
    """See before the work whether its result can be written; what is there stays.

    Args:
        path: Of a file, whose folder is made where there is none; None: nowhere.

    Raises:
        UserError: It cannot be written.
    """
    if path is not None:
        with suppress(_Tried), atomic(path, durable=False) as temporary:
            temporary.touch()
            raise _Tried


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


class _Tried(Exception):  # noqa: N818  # no error
    """Writing would have gone well."""


def _write(path: Path, text: str) -> None:
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
