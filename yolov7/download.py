"""The authors' published weights, fetched by name on first use.

A part that was cut is gone on with only while the server says that the file is still the same one;
what has come is loaded once before it is kept, and its SHA-256 is checked ever after.
"""

import hashlib
import json
import re
import sys
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from filelock import FileLock
from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

from yolov7.atomic import atomic
from yolov7.cache import cache_folder
from yolov7.errors import UserError
from yolov7.fetch import REFUSALS, Answer, answer_to, chunks, reason_of
from yolov7.progress import working
from yolov7.text import one_line

RELEASE = "https://github.com/WongKinYiu/yolov7/releases/download/v0.1/"
_BOTH = ("yolov7", "yolov7x", "yolov7-w6", "yolov7-e6", "yolov7-d6", "yolov7-e6e")

# File name -> variant.
PUBLISHED = {
    **{f"{name}.pt": name for name in (*_BOTH, "yolov7-tiny")},
    **{f"{name}_training.pt": name for name in _BOTH},
}

LARGEST = 4 << 30  # bytes of a file
PATIENCE = 30  # seconds within which an answer begins, and goes on by
SLOWEST = 1 << 10  # bytes per second
_RECORD = "sha256.json"  # file name -> SHA-256, beside the files
_CHUNK = 1 << 20
_TAG = re.compile(r'"[\x21\x23-\x7e]{1,200}"')  # a strong ETag: equal only for equal bytes
_RANGE = re.compile(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15})")
_PARTS = (HTTPStatus.PARTIAL_CONTENT, HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)


def published_weights(
    name: str, check: Callable[[Path], object], *, release: str = RELEASE
) -> Path:
    """The local path of the published file `name`, downloaded if it is not in the cache.

    The authors publish no digests: the first download is trusted if it passes the check, and says
    so. Of processes that ask at the same time one downloads, and the others wait.

    Args:
        name: a key of `PUBLISHED`.
        check: loads what has come, and raises UserError where that is no such checkpoint.
        release: URL of the folder that holds the files.

    Raises:
        UserError: no network, no such file, a download that is cut or too slow, something else than
            a checkpoint, or a file that has changed since.
    """
    path = cache_folder("weights") / name
    try:
        digest = _recorded(path)
        if digest is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(path.parent):
                digest = _recorded(path)  # by the process that had the lock before
                if digest is None:
                    digest = _download(release + name, path, check)
        if _sha256(path) != digest:
            raise UserError(
                f"{path}: its SHA-256 is not the one recorded at download; "
                "delete the file to download it again"
            )
    except OSError as error:
        raise UserError(f"{path.parent}: the cache cannot be used ({error})") from None
    return path


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, as long as the context lasts."""
    lock = FileLock(folder / "lock")
    # Some network file systems have no locks: there, let one process finish the first download.
    with (
        suppress(OSError, NotImplementedError),
        working(f"waiting for another download into {folder}"),
    ):
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _digests(folder: Path) -> dict[str, str]:
    record = folder / _RECORD
    if not record.exists():
        return {}
    digests: object = None
    with suppress(ValueError, RecursionError):
        digests = json.loads(record.read_bytes()[:_CHUNK])
    if not isinstance(digests, dict) or not all(isinstance(d, str) for d in digests.values()):
        raise UserError(f"{record}: damaged: delete it to download the weights again")
    return digests


def _recorded(path: Path) -> str | None:
    """The SHA-256 that a file had when it was downloaded; None where it has to be."""
    return _digests(path.parent).get(path.name) if path.exists() else None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _download(url: str, path: Path, check: Callable[[Path], object]) -> str:
    """Download, check and record a file; its SHA-256."""
    part = _Part(path.with_name(f"{path.name}.part"))
    _fetch(url, part)
    try:
        check(part.path)
    except UserError as error:
        part.discard()
        reason = str(error).removeprefix(f"{part.path}: ")
        raise UserError(f"{url}: what came is not kept: {reason}") from None
    digest = _sha256(part.path)
    with atomic(path.with_name(_RECORD)) as temporary:
        temporary.write_text(json.dumps(_digests(path.parent) | {path.name: digest}, indent=1))
    part.path.replace(path)
    part.discard()
    print(
        f"note: {path.name} is its authors', under GPL-3.0; it is trusted at this first download, "
        f"as they publish no digest; from now on it must have the SHA-256 {digest}",
        file=sys.stderr,
    )
    return digest


@dataclass(frozen=True)
class _Part:
    """What has come of a file, and beside it the tag of the version that it belongs to."""

    path: Path

    @property
    def _tag_file(self) -> Path:
        return self.path.with_suffix(".etag")

    def version(self) -> tuple[int, str]:
        """Bytes that are there, and their tag; 0 where there is nothing to go on with."""
        if not self.path.exists() or not self._tag_file.exists():
            return 0, ""
        tag = self._tag_file.read_bytes()[:1000].decode(errors="replace")
        return (self.path.stat().st_size, tag) if _TAG.fullmatch(tag) else (0, "")

    def begin(self, tag: str) -> None:
        """Forget what has come, and note of which version the next is."""
        self.discard()
        if _TAG.fullmatch(tag):
            self._tag_file.write_text(tag)

    def discard(self) -> None:
        """Remove both files."""
        self.path.unlink(missing_ok=True)
        self._tag_file.unlink(missing_ok=True)


def _fetch(url: str, part: _Part) -> None:
    """Download `url`, going on where an earlier download of the same version was cut."""
    have, tag = part.version()
    headers = {"Range": f"bytes={have}-", "If-Range": tag} if have else {}
    with _answer(urllib.request.Request(url, headers=headers)) as answer:
        found = answer.headers.get("ETag", "")
        start, total = _place(answer)
        if answer.status in _PARTS and have and (start, found) != (have, tag):
            part.discard()  # the end of another version, or of nothing
            return _fetch(url, part)
        if start != (have if answer.status == HTTPStatus.PARTIAL_CONTENT else 0):
            raise UserError(f"{url}: the server answers {answer.status} {one_line(answer.reason)}")
        if start == 0:
            part.begin(found)
        size = start
        with part.path.open("ab") as file, _progress() as progress:
            task = progress.add_task(Path(url).name, total=total, completed=start)
            for chunk in _chunks(answer, url):
                size += len(chunk)
                if max(size, total or 0) > LARGEST:
                    raise UserError(f"{url}: is over the limit of {LARGEST >> 20} MiB")
                file.write(chunk)
                progress.advance(task, len(chunk))
    if total is not None and size != total:
        raise UserError(f"{url}: cut off after {size} of {total} bytes; run again to resume")
    return None


def _place(answer: Answer) -> tuple[int | None, int | None]:
    """Where in the file the answer begins, None for none of it; how long the file is, if said."""
    if answer.status == HTTPStatus.OK:
        length = answer.headers.get("Content-Length", "")
        return 0, int(length) if re.fullmatch(r"\d{1,15}", length) else None
    found = _RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if answer.status == HTTPStatus.PARTIAL_CONTENT and found and found[1] != "0":
        return int(found[1]), int(found[2])
    return None, None


def _answer(request: urllib.request.Request) -> Answer:
    url = request.full_url
    try:
        return answer_to(request, PATIENCE)
    except TimeoutError as error:
        raise UserError(f"{url}: {one_line(error)}; run again to resume") from None
    except REFUSALS as error:
        raise UserError(
            f"{url}: cannot be reached ({reason_of(error)}); "
            "download it elsewhere and pass its path"
        ) from None


def _chunks(answer: Answer, url: str) -> Iterator[bytes]:
    try:
        yield from chunks(answer, PATIENCE, SLOWEST)
    except TimeoutError as error:
        raise UserError(f"{url}: {one_line(error)}; run again to resume") from None
    except REFUSALS as error:
        raise UserError(f"{url}: cut off ({reason_of(error)}); run again to resume") from None


def _progress() -> Progress:
    columns = (*Progress.get_default_columns(), DownloadColumn(), TransferSpeedColumn())
    return Progress(*columns, transient=True)
