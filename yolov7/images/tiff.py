"""TIFF's directories, which EXIF records are, too."""

import struct
from io import BytesIO
from typing import Any, BinaryIO, NamedTuple

SHORT = 3  # the 16-bit type
NUMBERS = {1: "B", SHORT: "H", 4: "I", 16: "Q"}  # the types of whole numbers
WIDTH, HEIGHT, BITS, ORIENTATION, SAMPLES = 256, 257, 258, 274, 277
TILE_WIDTH, TILE_HEIGHT, SAMPLE_FORMAT = 322, 323, 339


class Numbers(NamedTuple):
    """A tag's type and its first value."""

    kind: int
    value: int


def unpack(file: BinaryIO, form: str) -> tuple[Any, ...]:
    """The next bytes as numbers, `struct.error` where the file ends before."""
    return struct.unpack(form, file.read(struct.calcsize(form)))


def read_directory(file: BinaryIO) -> dict[int, Numbers]:
    """The first value of each whole-number tag of the first directory, by tag.

    Raises:
        struct.error, LookupError: The file is cut short, or no TIFF.
    """
    file.seek(0)
    order = {b"II": "<", b"MM": ">"}[file.read(2)]
    (version,) = unpack(file, f"{order}H")
    big = version == 43  # BigTIFF: 64-bit offsets, after four bytes that say so
    start = unpack(file, f"{order}HHQ" if big else f"{order}I")[-1]
    file.seek(start)
    (count,) = unpack(file, f"{order}Q" if big else f"{order}H")
    numbers: dict[int, Numbers] = {}
    elsewhere: list[tuple[int, int, int]] = []
    room = 8 if big else 4
    for _ in range(count):
        tag, kind, values, field = unpack(file, f"{order}HHQ8s" if big else f"{order}HHI4s")
        if kind not in NUMBERS or tag in numbers:  # the first of two counts, as for libtiff
            continue
        form = order + NUMBERS[kind]
        if values * struct.calcsize(form) > room:
            elsewhere.append((tag, kind, struct.unpack(f"{order}{'Q' if big else 'I'}", field)[0]))
            numbers[tag] = Numbers(kind, 0)
        else:
            numbers[tag] = Numbers(kind, *struct.unpack_from(form, field))
    for tag, kind, at in elsewhere:
        if tag in (BITS, SAMPLE_FORMAT):
            file.seek(at)
            numbers[tag] = Numbers(kind, *unpack(file, order + NUMBERS[kind]))
    return numbers


def exif_orientation(record: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1, upright, where the record says nothing that holds.

    Args:
        record: The EXIF record: a TIFF file without pictures.
    """
    try:
        kind, value = read_directory(BytesIO(record)).get(ORIENTATION, Numbers(SHORT, 1))
    except (struct.error, LookupError, ArithmeticError, ValueError):
        return 1
    return value if kind == SHORT and 1 <= value <= 8 else 1
