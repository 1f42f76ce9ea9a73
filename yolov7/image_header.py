"""The size that an image file claims, from its first bytes: before any pixel is decoded.

A few bytes may claim any size: 190 of an animated WebP, or 256 of a JPEG 2000, decode to
gigabytes. The formats here are those that can be smaller than their pixels a thousand times. WebP
of one frame and AVIF are not among them: their decoders end at 2^28 pixels by themselves.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from typing import Any, BinaryIO

PNG = b"\x89PNG\r\n\x1a\n"
SHORT = 3  # TIFF's 16-bit type
NUMBERS = {1: "B", SHORT: "H", 4: "I", 16: "Q"}  # TIFF's types of whole numbers
TIFF_WIDTH, TIFF_HEIGHT, ORIENTATION = 256, 257, 274


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        height: Pixels, as stored: an EXIF orientation of 5 to 8 exchanges them with the width.
        width: Pixels.
        orientation: EXIF's, 1 to 8; None where only the decoder can tell.
        end: What stands at the end of every whole file; empty where the format has no such mark.
    """

    height: int
    width: int
    orientation: int | None = None
    end: bytes = b""


def read_header(file: BinaryIO) -> Header | None:
    """The header of an image file; None where it is cut short, or of another format.

    Args:
        file: Binary stream that can seek, at its start.
    """
    magic = file.read(12)
    for start, read in FORMATS:
        if magic.startswith(start):
            try:
                header = read(file)
            except (struct.error, LookupError, OverflowError, ValueError):
                return None
            return header if header and header.height and header.width else None
    return None


def _unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, file.read(struct.calcsize(form)))


def _fixed(at: int, form: str, file: BinaryIO) -> Header:
    """Width and height at one place: GIF, Sun raster."""
    file.seek(at)
    width, height = _unpack(file, form)
    return Header(height, width)


def _png(file: BinaryIO) -> Header:
    file.seek(16)
    width, height = _unpack(file, ">II")
    orientation: int | None = 1
    file.seek(len(PNG))
    while True:
        length, kind = _unpack(file, ">I4s")
        if kind == b"IDAT":
            return Header(height, width, orientation, b"IEND")
        if kind == b"eXIf":
            orientation = None
        file.seek(length + 4, 1)


def _jpeg(file: BinaryIO) -> Header:
    orientation: int | None = 1
    file.seek(2)
    while True:
        # As libjpeg does: whatever stands before a marker is skipped, fill bytes too.
        while file.read(1)[0] != 0xFF:
            pass
        code = 0xFF
        while code == 0xFF:
            code = file.read(1)[0]
        if code in (0x00, 0x01) or 0xD0 <= code <= 0xD7:  # no marker, or one without a length
            continue
        (length,) = _unpack(file, ">H")
        # Start of frame, all codings; C4, C8 and CC are tables.
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            _, height, width = _unpack(file, ">BHH")
            return Header(height, width, orientation, b"\xff\xd9")
        body = file.read(length - 2)
        if code == 0xE1 and body.startswith(b"Exif\0\0"):
            orientation = _exif_orientation(body[6:])


def _exif_orientation(tiff: bytes) -> int | None:
    try:
        kind, value = _tiff_numbers(BytesIO(tiff)).get(ORIENTATION, (SHORT, 1))
    except (struct.error, LookupError):
        return None
    return value if kind == SHORT else None


def _tiff(file: BinaryIO) -> Header:
    numbers = _tiff_numbers(file)
    return Header(numbers[TIFF_HEIGHT][1], numbers[TIFF_WIDTH][1])


def _tiff_numbers(file: BinaryIO) -> dict[int, tuple[int, int]]:
    """Type and value of the first directory's whole numbers, by tag."""
    file.seek(0)
    order = {b"II": "<", b"MM": ">"}[file.read(2)]
    (version,) = _unpack(file, f"{order}H")
    big = version == 43  # BigTIFF: 64-bit offsets, after four bytes that say so
    start = _unpack(file, f"{order}HHQ" if big else f"{order}I")[-1]
    file.seek(start)
    (count,) = _unpack(file, f"{order}Q" if big else f"{order}H")
    numbers: dict[int, tuple[int, int]] = {}
    for _ in range(count):
        tag, kind, _, value = _unpack(file, f"{order}HHQ8s" if big else f"{order}HHI4s")
        if kind in NUMBERS:  # the first of two counts, as for libtiff
            numbers.setdefault(tag, (kind, *struct.unpack_from(order + NUMBERS[kind], value)))
    return numbers


def _bmp(file: BinaryIO) -> Header:
    file.seek(14)
    (size,) = _unpack(file, "<I")
    width, height = _unpack(file, "<HH" if size == 12 else "<ii")  # 12: OS/2
    return Header(abs(height), abs(width))  # negative: from above


def _webp(file: BinaryIO) -> Header | None:
    file.seek(12)
    if file.read(4) != b"VP8X":
        return None
    file.seek(24)
    low, high, low_height, high_height = _unpack(file, "<HBHB")
    return Header((high_height << 16 | low_height) + 1, (high << 16 | low) + 1)


def _jp2(file: BinaryIO) -> Header | None:
    file.seek(0)
    while True:
        length, kind = _unpack(file, ">I4s")
        rest = length - 8
        if length == 1:
            rest = _unpack(file, ">Q")[0] - 16
        if kind == b"jp2c":
            return _codestream(file.tell(), file)
        if rest < 0:
            return None
        file.seek(rest, 1)


def _codestream(at: int, file: BinaryIO) -> Header:
    """JPEG 2000 without boxes: the markers SOC and SIZ, two lengths, and the corners."""
    file.seek(at + 8)
    right, bottom, left, top = _unpack(file, ">IIII")
    return Header(max(bottom - top, 0), max(right - left, 0))


# First bytes of a format, and what reads its header.
FORMATS: tuple[tuple[bytes, Callable[[BinaryIO], Header | None]], ...] = (
    (PNG, _png),
    (b"\xff\xd8", _jpeg),
    (b"BM", _bmp),
    (b"II*\0", _tiff),
    (b"MM\0*", _tiff),
    (b"II+\0", _tiff),
    (b"MM\0+", _tiff),
    (b"GIF8", partial(_fixed, 6, "<HH")),
    (b"RIFF", _webp),
    (b"\0\0\0\x0cjP  ", _jp2),
    (b"\xff\x4f\xff\x51", partial(_codestream, 0)),
    (b"\x59\xa6\x6a\x95", partial(_fixed, 4, ">II")),
)
