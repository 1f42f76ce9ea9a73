"""Files that are whole or absent: written beside their place, then renamed into it.

with atomic(path) as temporary:
    temporary.write_bytes(content)
"""

import errno
import os
import re
import socket
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from threading import Lock

from yolov7.errors import UserError

# .yolov7-HOST-PROCESS-NUMBER.SUFFIX: of another host or container's processes only time tells, and
# the suffix tells some writers what to write.
_NAME = re.compile(r"\.yolov7-([0-9a-f]{8})-(\d+)-\d+(?:\.\w*)?")
_WEEK = 7 * 24 * 3600  # seconds


def _host() -> str:
    """Eight digits for where the numbers of processes are ours; containers may share a name."""
    place = socket.gethostname()
    with suppress(OSError):
        place += os.readlink("/proc/self/ns/pid")
    return f"{zlib.crc32(place.encode()):08x}"


_HOST = _host()
_DEVICES = (Path("/dev"), Path("/dev/fd"))
_numbers = count()
_swept: set[Path] = set()  # folders that this process has looked through
_sweeping = Lock()


@contextmanager
def atomic(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """A file to write, which takes the place of `path` when the context ends without an error.

    After an error it is removed, and what was at `path` stays. What a killed process has left in
    the folder is removed by the next one that writes there; what one of another host or container
    has left, after a week. A device, such as /dev/stdout, or a pipe cannot be replaced: it is
    written to itself.

    Args:
        path: Of the file; its folder is made where there is none.
        durable: Wait until the content is on the disk, so that not even a power cut leaves half a
            file. False for caches, whose readers see damage, and where milliseconds count.

    Raises:
        UserError: It cannot be written: an OSError in the context counts as that.
    """
    try:
        with _replacing(Path(path), durable) as temporary:
            yield temporary
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error})") from None


@contextmanager
def _replacing(path: Path, durable: bool) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():  # before the work is done
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.parent in _DEVICES or (path.exists() and not path.is_file()):
        yield path
        return
    path = Path(os.path.realpath(path))  # what a link leads to is replaced, not the link
    _sweep(path.parent)
    name = f".yolov7-{_HOST}-{os.getpid()}-{next(_numbers)}{path.suffix}"
    temporary = path.with_name(name)
    try:
        yield temporary
        if durable:
            _flush(temporary, os.O_RDWR)
        temporary.replace(path)
        if durable and sys.platform != "win32":  # which opens no folders
            with suppress(OSError):  # some network file systems cannot
                _flush(path.parent, os.O_RDONLY)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _flush(path: Path, mode: int) -> None:
    handle = os.open(path, mode)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _sweep(folder: Path) -> None:
    """Remove what dead processes of this host have left in a folder; once, for it may be large."""
    with _sweeping:
        if folder in _swept:
            return
        _swept.add(folder)
        with suppress(OSError):  # a folder that may be written in, but not listed
            for name in os.listdir(folder):
                if (found := _NAME.fullmatch(name)) and _is_left(folder / name, *found.groups()):
                    (folder / name).unlink(missing_ok=True)


def _is_left(file: Path, host: str, process: str) -> bool:
    """Whether nobody is writing a file any more, as far as can be told."""
    if host != _HOST or sys.platform == "win32":  # where asking for a process would end it
        return time.time() - file.stat().st_mtime > _WEEK
    if int(process) == os.getpid():  # which has not been here yet: another of this number has
        return True
    try:
        os.kill(int(process), 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # another user's
        return False
    return False
