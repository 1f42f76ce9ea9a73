"""What a `--device` stands for."""

import torch

from yolov7.errors import UserError


def resolve_device(name: str | torch.device) -> torch.device:
    """The device of a name; "auto" is CUDA where there is one, and "0" its first.

    Raises:
        UserError: No such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = parse_device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device {name}: {count} CUDA devices are here: use another, or cpu")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(f"device {name}: needs a Mac with Apple's GPU: use another, or cpu")
    return device


def parse_device(name: str | torch.device) -> torch.device:
    """The device of a name other than "auto", whether or not PyTorch sees it.

    Raises:
        UserError: It is no such name.
    """
    try:
        device = torch.device(f"cuda:{name}" if str(name).isdecimal() else name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"device {name}: give auto, cpu, cuda, cuda:N, N or mps")
    return device
