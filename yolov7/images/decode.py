"""From the bytes of an image file to a checked BGR array.

What a file claims is held against the limits before a decoder sees it, and PNG files are stripped
to the chunks that make the picture: OpenCV 4.12 to 5.0 ends with a segmentation fault at an empty
chunk of an animation, and takes whatever memory the length of a chunk asks for.
"""

import stat
from io import BytesIO
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from numpy.typing import NDArray

from yolov7.errors import UserError
from yolov7.images.header import PNG, Header, other_format, read_header
from yolov7.images.tiff import exif_orientation
from yolov7.letterbox import Image

MAX_PIXELS = 2**28  # 268 million
MAX_MEMORY = 3 * 2**28  # bytes at work while an image is decoded, or
FILE_SHARE = 32  # so many times its file's length, if that is more
MAX_FILE = 3 * 2**28  # bytes
MAX_SCANNED = 2**31  # pixels times scans of a JPEG: 2 to 3 s
TAIL = 64 * 1024  # some cameras write after the end mark
PNG_CHUNKS = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
# What cv2.flip is told for an orientation of EXIF, once those above 4 are transposed.
FLIPS = {2: 1, 3: -1, 4: 0, 6: 1, 7: -1, 8: 0}
REDUCED = {
    1: cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH,  # three channels, 8 or 16 bits
    2: cv2.IMREAD_REDUCED_COLOR_2,
    4: cv2.IMREAD_REDUCED_COLOR_4,
    8: cv2.IMREAD_REDUCED_COLOR_8,
}
KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def read_image(path: str | Path, *, shrink: int = 1) -> Image:
    """Decode an image file: upright by its EXIF record, alpha dropped, 16 bits scaled to 8.

    Args:
        path: Of the file.
        shrink: 1, 2, 4 or 8: a JPEG is decoded at this part of its size, for a third of the time.

    Returns:
        [H, W, 3] uint8, BGR.

    Raises:
        UserError: The file is missing, truncated, no image, or over a limit.
    """
    path = Path(path)
    _check_file(path)
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return decode_image(data, str(path), shrink=shrink)


def image_size(path: str | Path) -> tuple[int, int]:
    """Height and width in pixels of the upright image.

    JPEG and PNG files are read up to their pixels, and their last bytes, in tens of microseconds;
    every other file, and whatever is not whole, is decoded.

    Raises:
        UserError: The file is missing, truncated, no image, or over a limit.
    """
    path = Path(path)
    _check_file(path)
    try:
        with path.open("rb") as file:
            header = read_header(file)
            if header and header.end and _is_whole(file, header):
                _check_cost(header, file.tell(), str(path))
                return header.upright
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    height, width = read_image(path).shape[:2]
    return height, width


def decode_image(data: bytes, name: str, *, shrink: int = 1) -> Image:
    """``read_image`` for the bytes of a file; ``name`` stands in the error messages."""
    broken = UserError(f"{name}: truncated, or not an image: replace the file or leave it out")
    header = read_header(BytesIO(data))
    if header is None:
        if other := other_format(data[:12]):
            raise UserError(f"{name}: {other}, which is not read here: make it a JPEG or PNG")
        raise broken
    _check_cost(header, len(data), name)
    orientation = header.orientation
    if header.kind == "PNG":
        cleaned, orientation = _clean_png(data, header)
        if cleaned is None:
            raise broken
        data = cleaned
    if header.kind == "JPEG":
        # In progressive files each scan visits all pixels, which takes a few bytes.
        scans = data.count(b"\xff\xda", header.body - 4)
        if scans * header.height * header.width > MAX_SCANNED:
            raise UserError(f"{name}: a JPEG of {scans} scans: save it anew, or make it smaller")
    else:
        shrink = 1
    try:
        flags = REDUCED[shrink] | cv2.IMREAD_IGNORE_ORIENTATION
        image = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error:  # also for what OpenCV's own limits refuse
        raise broken from None
    if image is None:
        raise broken
    if header.kind != "TIFF":  # which OpenCV turns in any case
        image = _turned(image, orientation)
    return to_bgr(image, name)


def to_bgr(array: NDArray[Any], name: str) -> Image:
    """An 8- or 16-bit array as [H, W, 3] uint8 BGR; grey is repeated, alpha dropped.

    Args:
        array: [H, W] or [H, W, C], C = 1, 3 (BGR) or 4 (BGRA); uint8 or uint16.
        name: Stands in the error messages.

    Raises:
        UserError: Another shape or dtype, no pixels, or over ``MAX_PIXELS``.
    """
    if array.ndim == 2:
        array = array[:, :, None]
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4) or array.size == 0:
        shape = "x".join(map(str, array.shape))
        raise UserError(f"{name}: shape {shape} is not an image: give H x W x 1, 3 or 4")
    pixels = array.shape[0] * array.shape[1]
    if pixels > MAX_PIXELS:
        raise _too_large(name, pixels)
    if array.dtype == np.uint16:
        # In one pass, without floats beside it; it drops the last axis where that is 1.
        scaled = cv2.convertScaleAbs(np.ascontiguousarray(array), alpha=255 / 65535)
        array = np.asarray(scaled, np.uint8).reshape(array.shape)
    if array.dtype != np.uint8:
        raise UserError(f"{name}: pixels are {array.dtype}: give 8 or 16 bits without sign")
    if array.shape[2] == 1:
        array = np.broadcast_to(array, (*array.shape[:2], 3))
    return np.ascontiguousarray(array[:, :, :3])


def _check_file(path: Path) -> None:
    """Refuse what is no file before it is opened: a pipe would be waited for."""
    try:
        status = path.stat()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path") from None
    except (OSError, ValueError) as error:  # a name too long, a NUL in it
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: cannot be read: {reason}") from None
    if not stat.S_ISREG(status.st_mode):
        kind = next((kind for test, kind in KINDS if test(status.st_mode)), "no file")
        raise UserError(f"{path}: cannot be read: it is {kind}, not an image file")
    if status.st_size > MAX_FILE:
        raise UserError(
            f"{path}: {status.st_size >> 20} MB, over the limit of {MAX_FILE >> 20} MB for a file: "
            "make it smaller or cut it up"
        )


def _is_whole(file: BinaryIO, header: Header) -> bool:
    """Whether the end mark of a JPEG or PNG is there; the file is left at its end."""
    length = file.seek(0, 2)
    file.seek(max(length - TAIL, header.body))
    tail = file.read()
    if tail.rfind(header.end) < 0:  # from the end on: it is nearly always there
        return False
    return header.kind != "PNG" or b"eXIf" not in tail  # an orientation that comes late


def _check_cost(header: Header, length: int, name: str) -> None:
    if header.refusal:
        raise UserError(f"{name}: {header.refusal}")
    pixels = header.height * header.width
    if pixels > MAX_PIXELS or pixels * header.cost > max(MAX_MEMORY, FILE_SHARE * length):
        raise _too_large(name, pixels, header)


def _too_large(name: str, pixels: int, header: Header | None = None) -> UserError:
    kind = f" of a {header.kind} file of its kind" if header else ""
    limit = min(MAX_PIXELS, int(MAX_MEMORY / header.cost)) if header else MAX_PIXELS
    return UserError(
        f"{name}: {pixels / 1e6:.0f} million pixels, over the limit of {limit / 1e6:.0f} million"
        f"{kind}: make it smaller or cut it up"
    )


def _clean_png(data: bytes, header: Header) -> tuple[bytes | None, int]:
    """The chunks that make the picture, and its orientation; None where one leaves the file."""
    orientation, start, kept = header.orientation, len(PNG), [memoryview(PNG)]
    view = memoryview(data)
    while start + 12 <= len(data):
        end = start + 12 + int.from_bytes(view[start : start + 4], "big")
        if end > len(data):
            break
        chunk = bytes(view[start + 4 : start + 8])
        if chunk in PNG_CHUNKS:
            kept.append(view[start:end])
        elif chunk == b"eXIf":
            orientation = exif_orientation(bytes(view[start + 8 : end - 4]))
        if chunk == b"IEND":
            return b"".join(kept), orientation
        start = end
    return None, orientation


def _turned(image: NDArray[Any], orientation: int) -> NDArray[Any]:
    """The image upright, by EXIF's orientation 1 to 8."""
    if orientation > 4:
        image = cv2.transpose(image)
    return cv2.flip(image, FLIPS[orientation]) if orientation in FLIPS else image
