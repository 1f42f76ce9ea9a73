"""The authors' published weights, fetched by name on first use."""

import hashlib
import json
import os
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http import HTTPStatus
from pathlib import Path

from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from yolov7.cache import cache_folder
from yolov7.errors import UserError
from yolov7.progress import working

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]  # a module, or none

RELEASE = "https://github.com/WongKinYiu/yolov7/releases/download/v0.1/"
_BOTH = ("yolov7", "yolov7x", "yolov7-w6", "yolov7-e6", "yolov7-d6", "yolov7-e6e")

# File name -> variant.
PUBLISHED = {
    **{f"{name}.pt": name for name in (*_BOTH, "yolov7-tiny")},
    **{f"{name}_training.pt": name for name in _BOTH},
}

_RECORD = "sha256.json"  # file name -> SHA-256, beside the files
_CHUNK = 1 << 20
_TIMEOUT = 30  # seconds without a byte


def published_weights(name: str, *, release: str = RELEASE) -> Path:
    """The local path of the published file `name`, downloaded if it is not in the cache.

    The file's SHA-256 is recorded at the first download and checked at every use. A download that
    was cut is resumed. Of processes that ask at the same time one downloads, and the others wait;
    on Windows nothing holds them back, so let one finish the first download there.

    Args:
        name: a key of `PUBLISHED`.
        release: URL of the folder that holds the files.

    Raises:
        UserError: no network, no such file, a cut download, or a file that has changed since.
    """
    path = cache_folder("weights") / name
    try:
        digest = _recorded(path)
        if digest is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent):
                digest = _recorded(path)  # by the process that had the lock before
                if digest is None:
                    _fetch(release + name, path)
                    digest = _record(path)
        if _sha256(path) != digest:
            raise UserError(
                f"{path}: its SHA-256 is not the one recorded at download; "
                "delete the file to download it again"
            )
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path.parent}: the cache cannot be used ({error})") from None
    return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, as long as the context lasts."""
    with (folder / "lock").open("w") as file:  # stays: deleting it would open a gap
        # Windows has no fcntl, and some network file systems no locks: there, only one process
        # should ask for a file that is not in the cache yet.
        if fcntl is not None:
            with suppress(OSError), working(f"waiting for another download into {folder}"):
                fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _digests(folder: Path) -> dict[str, str]:
    record = folder / _RECORD
    return json.loads(record.read_text()) if record.exists() else {}


def _recorded(path: Path) -> str | None:
    """The SHA-256 that a file had when it was downloaded; None where it has to be."""
    return _digests(path.parent).get(path.name) if path.exists() else None


def _record(path: Path) -> str:
    """Note the SHA-256 of a file that has been downloaded."""
    digest = _sha256(path)
    temporary = path.with_name(f"{_RECORD}.{os.getpid()}")
    temporary.write_text(json.dumps(_digests(path.parent) | {path.name: digest}, indent=1))
    temporary.replace(path.with_name(_RECORD))
    return digest


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(url: str, path: Path) -> None:
    """Download `url` to `path`, going on from `path`.part where an earlier download was cut."""
    part = path.with_name(path.name + ".part")
    have = part.stat().st_size if part.exists() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
            resumed = response.status == HTTPStatus.PARTIAL_CONTENT
            start = have if resumed else 0
            length = response.headers.get("Content-Length")
            total = start + int(length) if length else None
            with part.open("ab" if resumed else "wb") as file, _progress() as progress:
                task = progress.add_task(path.name, total=total, completed=start)
                while chunk := response.read(_CHUNK):
                    file.write(chunk)
                    progress.advance(task, len(chunk))
    except urllib.error.HTTPError as error:
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            part.unlink()  # the part is not the beginning of this file
            return _fetch(url, path)
        raise UserError(f"{url}: the server answers {error.code} {error.reason}") from None
    except urllib.error.URLError as error:
        raise UserError(
            f"{url}: cannot be reached ({error.reason}); download it elsewhere and pass its path"
        ) from None
    except (TimeoutError, ConnectionError) as error:
        raise UserError(f"{url}: cut off ({error}); run again to resume") from None
    size = part.stat().st_size
    if total is not None and size != total:
        raise UserError(f"{url}: cut off after {size} of {total} bytes; run again to resume")
    part.replace(path)
    return None


def _progress() -> Progress:
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, transient=True)
