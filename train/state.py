"""The state of a run between two epochs, on the disk: atomic, with the previous one kept."""

import os
from pathlib import Path
from typing import Any

import torch

from yolov7.errors import UserError

State = dict[str, Any]  # tensors, numbers, texts, and dictionaries and lists of these
# NEXT is what a killed save leaves; the one after it writes it over.
LAST, PREVIOUS, NEXT = "state.pt", "state.previous.pt", "state.next.pt"


def save_state(folder: Path, state: State) -> None:
    """Write the state; whenever the process dies, one whole state is left.

    Raises:
        UserError: the disk is full or read-only; the states that were there are intact.
    """
    last, temporary = folder / LAST, folder / NEXT
    try:
        with temporary.open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if last.exists():
            last.replace(folder / PREVIOUS)
        temporary.replace(last)
    except (OSError, RuntimeError) as error:  # torch's writer raises the latter on a full disk
        temporary.unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        raise UserError(
            f"{last}: cannot be written ({reason}): the state of the epoch before is intact; make "
            f"room, then `yolov7 train --resume {folder}`"
        ) from None


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
    detail = "; ".join(problems) or f"no {LAST} there: its first epoch was not finished"
    raise UserError(f"{folder}: cannot be resumed: {detail}")
