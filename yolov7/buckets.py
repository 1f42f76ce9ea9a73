"""Images in object stores, through fsspec and the store's package: s3fs, gcsfs, huggingface_hub.

Credentials are found as these packages find them; an address holds none.
"""

from typing import Any

from yolov7.errors import UserError, first_line
from yolov7.fetch import LARGEST
from yolov7.images import IMAGE_SUFFIXES
from yolov7.text import without_secrets

# Scheme -> the package that reads it; "" where fsspec does.
STORES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub", "memory": ""}


def list_bucket(address: str) -> list[str]:
    """The images that an address stands for: itself, those of a folder, those of a pattern.

    Raises:
        UserError: There is none, or the store does not answer.
    """
    store, path = _open(address)
    name = without_secrets(address)
    try:
        if store.isdir(path):
            found = store.ls(path, detail=False)
        elif any(letter in path for letter in "*?[") and not store.isfile(path):
            found = store.glob(path)
        else:
            return [address]
    except Exception as error:  # each package has its own
        raise UserError(f"{name}: cannot be read: {first_line(error)}") from None
    images = sorted(p for p in found if p.lower().endswith(tuple(IMAGE_SUFFIXES)))
    if not images:
        raise UserError(f"{name}: no images there: name a folder or a pattern with some")
    return [store.unstrip_protocol(path) for path in images]


def read_bucket(address: str) -> bytes:
    """The bytes of an image.

    Raises:
        UserError: It is not there, it is too large, or the store does not answer.
    """
    store, path = _open(address)
    name = without_secrets(address)
    try:
        with store.open(path, "rb") as file:
            data: bytes = file.read(LARGEST + 1)
    except Exception as error:  # each package has its own
        raise UserError(f"{name}: cannot be read: {first_line(error)}") from None
    if len(data) > LARGEST:
        raise UserError(f"{name}: over the limit of {LARGEST >> 20} MB")
    return data


def _open(address: str) -> tuple[Any, str]:
    """The store of an address, and the path in it."""
    scheme = address.partition("://")[0]
    try:
        import fsspec

        found: tuple[Any, str] = fsspec.core.url_to_fs(address)
    except ImportError:
        package = STORES[scheme] or "fsspec"
        raise UserError(f"{scheme}:// needs a package: pip install {package}") from None
    except Exception as error:  # no credentials, no bucket in the address
        why = first_line(error)
        raise UserError(f"{without_secrets(address)}: cannot be read: {why}") from None
    return found
