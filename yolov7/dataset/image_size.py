"""Height and width of an image file, from its header where the format allows.

JPEG and PNG files are read up to their size (tens of microseconds); a file whose end mark is
missing, and every other format, is decoded by the reader that prediction uses, which decides
whether it is an image.
"""

import struct
from pathlib import Path
from typing import BinaryIO

from yolov7.sources import read_image

PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC = b"\xff\xd8"
TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
ORIENTATION_TAG = 0x0112
TAIL = 64 * 1024  # some cameras write after the end mark


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of the upright image (EXIF orientation applied).

    Raises:
        UserError: The file is missing, truncated or no image.
    """
    try:
        with path.open("rb") as file:
            size = _header_size(file)
    except (OSError, struct.error, IndexError, ValueError):
        size = None
    if size is None:
        height, width = read_image(path).shape[:2]
        return height, width
    return size


def _header_size(file: BinaryIO) -> tuple[int, int] | None:
    magic = file.read(len(PNG_MAGIC))
    if magic == PNG_MAGIC:
        return _png_size(file) if _ends_with(file, b"IEND") else None
    if magic.startswith(JPEG_MAGIC):
        return _jpeg_size(file) if _ends_with(file, b"\xff\xd9") else None
    return None


def _ends_with(file: BinaryIO, mark: bytes) -> bool:
    length = file.seek(0, 2)
    file.seek(max(length - TAIL, 0))
    return mark in file.read()


def _png_size(file: BinaryIO) -> tuple[int, int] | None:
    file.seek(len(PNG_MAGIC))
    size = None
    while True:
        length, kind = struct.unpack(">I4s", file.read(8))
        if kind == b"IHDR":
            width, height = struct.unpack(">II", file.read(8))
            size = (height, width)
            file.seek(length - 8 + 4, 1)
        elif kind == b"eXIf":
            return None  # may be rotated: let the reader decide
        elif kind == b"IDAT":
            return size if size and min(size) > 0 else None
        else:
            file.seek(length + 4, 1)


def _jpeg_size(file: BinaryIO) -> tuple[int, int] | None:
    file.seek(len(JPEG_MAGIC))
    orientation = 1
    while True:
        byte, marker = file.read(1), file.read(1)
        if byte != b"\xff":
            return None
        while marker == b"\xff":  # fill bytes
            marker = file.read(1)
        code = marker[0]
        (length,) = struct.unpack(">H", file.read(2))
        # start of frame, all codings; C4, C8 and CC are tables
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            _, height, width = struct.unpack(">BHH", file.read(5))
            if not height or not width:
                return None
            return (width, height) if orientation in TRANSPOSED else (height, width)
        body = file.read(length - 2)
        if code == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _exif_orientation(body[6:])


def _exif_orientation(tiff: bytes) -> int:
    """Orientation 1 to 8 from the first directory of a TIFF structure, 1 where it has none."""
    order = {b"II": "<", b"MM": ">"}.get(tiff[:2])
    if order is None:
        return 1
    (start,) = struct.unpack_from(f"{order}I", tiff, 4)
    (entries,) = struct.unpack_from(f"{order}H", tiff, start)
    for entry in range(start + 2, start + 2 + 12 * entries, 12):
        tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, entry)
        if tag == ORIENTATION_TAG:
            return int(value)
    return 1
