"""What a failure of a compiler, a driver or a device comes to."""

import inspect
import warnings
from pathlib import Path

import torch

from yolov7.errors import UserError

# Of this package and of PyTorch, whose frames lie between what happens and whose line it is.
_FOLDERS = (str(Path(__file__).parents[1]), str(Path(torch.__file__).parent))


def warn(message: str) -> None:
    """A warning about the line of the user's that led here."""
    frame, level = inspect.currentframe(), 1
    while frame is not None and frame.f_code.co_filename.startswith(_FOLDERS):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level - 1 if frame is None else level)


def require_living_device(device: torch.device, reason: str) -> None:
    """Make sure that the device can go on after an error.

    Raises:
        UserError: It cannot: no work of this process reaches it any more.
    """
    if device.type != "cuda":
        return
    try:
        # Of the stream, not of the device: that would end a capture of another thread.
        torch.cuda.current_stream(device).synchronize()
    except RuntimeError:
        raise lost(device, reason) from None


def lost(device: torch.device, reason: str) -> UserError:
    """The error of a device that no work reaches any more."""
    return UserError(
        f"{device} has failed ({reason}): start again, with --engine eager if it does so twice"
    )
