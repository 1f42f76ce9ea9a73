"""Height and width of an image file, from its header where the format allows.

JPEG and PNG files are read up to their size (tens of microseconds); a file whose end mark is
missing, and every other format, is decoded by the reader that prediction uses, which decides
whether it is an image.
"""

from pathlib import Path
from typing import BinaryIO

from yolov7.image_header import read_header
from yolov7.sources import read_image

TRANSPOSED = (5, 6, 7, 8)  # EXIF orientations that exchange height and width
TAIL = 64 * 1024  # some cameras write after the end mark


def image_size(path: Path) -> tuple[int, int]:
    """Height and width in pixels of the upright image (EXIF orientation applied).

    Raises:
        UserError: The file is missing, truncated or no image.
    """
    try:
        with path.open("rb") as file:
            size = _whole_size(file)
    except OSError:
        size = None
    if size is None:
        height, width = read_image(path).shape[:2]
        return height, width
    return size


def _whole_size(file: BinaryIO) -> tuple[int, int] | None:
    """The upright size, None where the header does not tell or the file's end is missing."""
    header = read_header(file)
    if header is None or header.orientation is None:
        return None
    length = file.seek(0, 2)
    file.seek(max(length - TAIL, 0))
    if header.end not in file.read():
        return None
    turned = header.orientation in TRANSPOSED
    return (header.width, header.height) if turned else (header.height, header.width)
