"""The state of a run between two epochs, on the disk: atomic, with the previous one kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from yolov7.atomic import atomic
from yolov7.errors import UserError
from yolov7.text import one_line

State = dict[str, Any]  # tensors, numbers, texts, and dictionaries and lists of these
LAST, PREVIOUS = "state.pt", "state.previous.pt"


@contextmanager
def reading_state(folder: Path) -> Iterator[None]:
    """What a state of other keys, types or shapes leads to, as one line.

    Raises:
        UserError: instead of what its parts complain of.
    """
    try:
        yield
    except UserError:
        raise
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        what = one_line(f"{type(error).__name__}: {error}")
        raise UserError(
            f"{folder}: cannot be resumed: {LAST} is damaged, or of another version ({what})"
        ) from None


def save_state(folder: Path, state: State) -> None:
    """Write the state; whenever the process dies, one whole state is left.

    Raises:
        UserError: the disk is full or read-only; the states that were there are intact.
    """
    last = folder / LAST
    try:
        with atomic(last) as temporary:
            try:
                torch.save(state, temporary)
            except RuntimeError as error:  # torch's writer, on a full disk
                raise OSError(str(error).splitlines()[0]) from None
            if last.exists():
                last.replace(folder / PREVIOUS)
    except UserError as error:
        kept = any((folder / name).exists() for name in (LAST, PREVIOUS))
        remedy = f"the state before it is intact; make room, then `yolov7 train --resume {folder}`"
        raise UserError(f"{error}: {remedy if kept else 'make room, then start again'}") from None


def load_state(folder: Path) -> State:
    """The newest whole state of a run.

    Raises:
        UserError: there is none.
    """
    problems = []
    for name in (LAST, PREVIOUS):
        path = folder / name
        if not path.is_file():
            continue
        try:
            return dict(torch.load(path, map_location="cpu", weights_only=True))
        except Exception as error:  # cut short, or no state: the one before may be whole
            problems.append(f"{name} is damaged ({type(error).__name__})")
    detail = "; ".join(problems) or f"no {LAST} there: it is no run's folder"
    raise UserError(f"{folder}: cannot be resumed: {detail}")
