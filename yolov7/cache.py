"""The user's cache folder."""

import os
from pathlib import Path


def cache_folder(name: str) -> Path:
    """The folder `name` of the cache: under YOLOV7_CACHE, else under the user's cache folder."""
    base = os.environ.get("YOLOV7_CACHE")
    if base:
        return Path(base) / name
    user = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(user) / "yolov7-triton" / name
