"""What a failure of a compiler, a driver or a device comes to."""

import torch

from yolov7.errors import UserError


def first_line(error: BaseException) -> str:
    """An error in one line, for a warning."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def require_living_device(device: torch.device, reason: str) -> None:
    """Make sure that the device can go on after an error.

    Raises:
        UserError: It cannot: no work of this process reaches it any more.
    """
    if device.type != "cuda":
        return
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        raise UserError(
            f"{device} has failed ({reason}): start again, with --engine eager if it does so twice"
        ) from None
