"""The user's cache folder."""

import os
from pathlib import Path

from yolov7.errors import UserError


def cache_folder(name: str) -> Path:
    """The folder `name` of the cache: under YOLOV7_CACHE, else under the user's cache folder.

    Raises:
        UserError: The user has none.
    """
    base = os.environ.get("YOLOV7_CACHE")
    if base:
        return Path(base) / name
    try:
        user = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a name, as in containers
        raise UserError("there is no home folder: let YOLOV7_CACHE name a folder") from None
    return user / "yolov7-triton" / name
