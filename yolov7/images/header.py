"""What an image file claims, from its first bytes: before any pixel is decoded.

A few bytes may claim any size: 190 of an animated WebP, or 256 of a JPEG 2000, decode to
gigabytes. So every format that is read has its function here, and what has none is not read.
"""

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import BinaryIO

from yolov7.images import tiff
from yolov7.images.tiff import exif_orientation, read_directory, unpack

PNG = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xae\x42\x60\x82"
JPEG_END = b"\xff\xd9"
LONGEST_EXIF = 2**16
# First bytes of what is often called an image, and is not read here.
OTHERS = (
    (b"#?R", "a Radiance picture"),
    (b"v/1\x01", "an OpenEXR picture"),
    (b"\x59\xa6\x6a\x95", "a Sun raster picture"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF"),
    (b"<", "a text of markup, such as SVG or a web page"),
)


@dataclass(frozen=True)
class Header:
    """What a file says of itself.

    Attributes:
        height: Pixels, as stored: an orientation of 5 to 8 exchanges them with the width.
        width: Pixels.
        cost: Bytes that OpenCV takes at most for each pixel while it decodes, measured with 5.0:
            twice the array, and what the format's library holds beside it.
        kind: The format.
        orientation: EXIF's, 1 to 8.
        body: Where the pixels begin: from there on `end` is to be found.
        end: What stands at the end of every whole file; empty where the format has no such mark.
        refusal: Why the pixels cannot be used; empty where they can.
    """

    height: int
    width: int
    cost: float
    kind: str
    orientation: int = 1
    body: int = 0
    end: bytes = b""
    refusal: str = ""

    @property
    def upright(self) -> tuple[int, int]:
        """Height and width in pixels once the orientation is applied."""
        return (self.width, self.height) if self.orientation > 4 else (self.height, self.width)


def read_header(file: BinaryIO) -> Header | None:
    """The header of an image file; None where it is cut short, or of a format that is not read.

    Args:
        file: Binary stream that can seek, at its start.
    """
    magic = file.read(12)
    for at, start, read in FORMATS:
        if magic.startswith(start, at):
            try:
                header = read(file)
            except (struct.error, LookupError, ArithmeticError, ValueError):
                return None
            return header if header and header.height > 0 and header.width > 0 else None
    return None


def other_format(start: bytes) -> str | None:
    """What a file is that is called an image and is not read here, by its first bytes."""
    if start[4:8] == b"ftyp":
        heif = start[8:12] in (b"heic", b"heix", b"hevc", b"mif1", b"msf1")
        return "a HEIC picture" if heif else "a video"
    return next((name for magic, name in OTHERS if start.startswith(magic)), None)


def _png(file: BinaryIO) -> Header:
    file.seek(16)
    width, height, bits = unpack(file, ">IIB")
    orientation = 1
    file.seek(len(PNG))
    while True:
        length, chunk = unpack(file, ">I4s")
        if chunk == b"IDAT":
            cost = 12.5 if bits == 16 else 6.5
            return Header(height, width, cost, "PNG", orientation, file.tell() - 8, PNG_END)
        if chunk == b"eXIf" and length < LONGEST_EXIF:
            orientation = exif_orientation(file.read(length))
            file.seek(4, 1)
        else:
            file.seek(length + 4, 1)


def _jpeg(file: BinaryIO) -> Header:
    orientation, exif, frame = 1, False, (0, 0, 0.0)
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
        (length,) = unpack(file, ">H")
        if code == 0xDA:
            return Header(*frame, "JPEG", orientation, file.tell(), JPEG_END)
        body = file.read(length - 2)
        # Start of frame, all codings; C4, C8 and CC are tables.
        if 0xC0 <= code <= 0xCF and code not in (0xC4, 0xC8, 0xCC):
            frame = _jpeg_frame(body)
        elif code == 0xE1 and not exif and body.startswith(b"Exif\0\0"):
            orientation, exif = exif_orientation(body[6:]), True


def _jpeg_frame(body: bytes) -> tuple[int, int, float]:
    """Height, width and cost: files of several scans keep 2 bytes a coefficient to their end."""
    _, height, width, components = struct.unpack_from(">BHHB", body)
    factors = [(body[7 + 3 * i] >> 4, body[7 + 3 * i] & 15) for i in range(components)]
    largest = max(across for across, _ in factors) * max(down for _, down in factors)
    samples = sum(across * down for across, down in factors) / largest
    return height, width, max(6.5, 3.5 + 2 * samples)


def _tiff(file: BinaryIO) -> Header:
    numbers = {tag: number.value for tag, number in read_directory(file).items()}
    height, width = numbers[tiff.HEIGHT], numbers[tiff.WIDTH]
    bits, form = numbers.get(tiff.BITS, 1), numbers.get(tiff.SAMPLE_FORMAT, 1)
    cost = 6.5 * max(bits // 8, 1)
    # A tile may be larger than the image, and is decoded whole.
    tile = numbers.get(tiff.TILE_HEIGHT, 0) * numbers.get(tiff.TILE_WIDTH, 0)
    cost += cost * tile / max(height * width, 1)
    orientation = numbers.get(tiff.ORIENTATION, 1)
    refusal = ""
    if form != 1 or bits > 16:
        kind = {1: "unsigned", 2: "signed", 3: "floating"}.get(form, "other")
        refusal = f"its pixels are {bits}-bit {kind} numbers: give 8 or 16 bits without sign"
    turned = orientation if 1 <= orientation <= 8 else 1
    return Header(height, width, cost, "TIFF", turned, refusal=refusal)


def _bmp(file: BinaryIO) -> Header:
    file.seek(14)
    (size,) = unpack(file, "<I")
    width, height = unpack(file, "<HH" if size == 12 else "<ii")  # 12: OS/2
    return Header(abs(height), abs(width), 6.5, "BMP")  # negative: from above


def _gif(file: BinaryIO) -> Header:
    file.seek(6)
    width, height = unpack(file, "<HH")
    return Header(height, width, 12.5, "GIF")


def _webp(file: BinaryIO) -> Header | None:
    """The canvas, or the one frame; every chunk has to lie within the file."""
    length = file.seek(0, 2)
    file.seek(12)
    size: tuple[int, int] | None = None
    cost, orientation = 8.0, 1
    while (at := file.tell()) + 8 <= length:
        chunk, room = unpack(file, "<4sI")
        if at + 8 + room > length:
            return None
        if size is None:
            size = _webp_size(chunk, file.read(10))
            if chunk == b"VP8X":
                file.seek(at + 8)
                cost = 12.0 if file.read(1)[0] & 2 else cost  # frames on two canvases
        elif chunk == b"EXIF" and room < LONGEST_EXIF:
            orientation = exif_orientation(file.read(room))
        file.seek(at + 8 + room + room % 2)
    return Header(*size, cost, "WebP", orientation) if size else None


def _webp_size(chunk: bytes, start: bytes) -> tuple[int, int]:
    """Height and width of the first chunk: a canvas, a frame without loss, or a lossy one."""
    if chunk == b"VP8X":
        low, high, low_height, high_height = struct.unpack("<HBHB", start[4:])
        return (high_height << 16 | low_height) + 1, (high << 16 | low) + 1
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", start, 1)
        return (bits >> 14 & 0x3FFF) + 1, (bits & 0x3FFF) + 1
    width, height = struct.unpack_from("<HH", start, 6)
    return height & 0x3FFF, width & 0x3FFF


def _jp2(file: BinaryIO) -> Header | None:
    file.seek(0)
    while True:
        length, kind = unpack(file, ">I4s")
        rest = length - 8
        if length == 1:
            rest = unpack(file, ">Q")[0] - 16
        if kind == b"jp2c":
            return _codestream(file.tell(), file)
        if rest < 0:
            return None
        file.seek(rest, 1)


def _codestream(at: int, file: BinaryIO) -> Header:
    """JPEG 2000 without boxes: the markers SOC and SIZ, two lengths, and the corners."""
    file.seek(at + 8)
    right, bottom, left, top, *_, components, depth = unpack(file, ">8IHB")
    cost = 4 * components + (13 if depth & 127 > 7 else 6.5)  # 32 bits a sample beside the array
    return Header(max(bottom - top, 0), max(right - left, 0), cost, "JPEG 2000")


def _pnm(file: BinaryIO) -> Header | None:
    """PBM, PGM and PPM, binary or plain; every sample has to have its bits in the file."""
    file.seek(0)
    words = re.sub(rb"#[^\n]*\n", b" ", file.read(512)).split(maxsplit=4)
    form, width, height = int(words[0][1:]), int(words[1]), int(words[2])
    samples = width * height * (3 if form % 3 == 0 else 1)
    deep = form % 3 != 1 and int(words[3]) > 255
    if form < 4:  # a letter and a space a sample; a bitmap may leave out the space
        needed = samples if form == 1 else 2 * samples - 1
    else:
        needed = (width + 7) // 8 * height if form == 4 else samples * (2 if deep else 1)
    if needed > file.seek(0, 2):
        return None
    return Header(height, width, 12.5 if deep else 6.5, "PNM")


def _avif(file: BinaryIO) -> Header | None:
    """AVIF: the largest picture that its boxes name, turned as they say."""
    file.seek(0)
    start = file.read(64)
    brands = start[8 : int.from_bytes(start[:4], "big")]
    if b"avif" not in brands and b"avis" not in brands:
        return None
    found: dict[bytes, list[bytes]] = {b"ispe": [], b"irot": [], b"pixi": []}
    if not _boxes(file, (0, file.seek(0, 2)), (b"meta", b"iprp", b"ipco"), found):
        return None
    sizes = [struct.unpack(">II", box[4:12]) for box in found[b"ispe"]]
    width, height = max(sizes, key=lambda size: size[0] * size[1])
    cost = 36.0 if b"avis" in brands else 18.0
    cost *= 2 if any(box[5] > 8 for box in found[b"pixi"]) else 1
    turns = found[b"irot"][0][0] & 3 if found[b"irot"] else 0  # quarters, anticlockwise
    return Header(height, width, cost, "AVIF", (1, 8, 3, 6)[turns])


def _boxes(
    file: BinaryIO,
    span: tuple[int, int],
    path: tuple[bytes, ...],
    found: dict[bytes, list[bytes]],
) -> bool:
    """Collect the small boxes at the end of a path of boxes; False where one leaves its span."""
    start, end = span
    while start + 8 <= end:
        file.seek(start)
        length, kind = unpack(file, ">I4s")
        body = start + 8
        if length == 1:
            (length,) = unpack(file, ">Q")
            body += 8
        last = start + length if length else end
        if last < body or last > end:
            return False
        if kind in found:
            found[kind].append(file.read(min(last - body, 16)))
        elif kind in path[:1]:
            inside = (body + (4 if kind == b"meta" else 0), last)
            if not _boxes(file, inside, path[1:], found):
                return False
        start = last
    return True


# Where the mark of a format stands, the mark, and what reads its header.
FORMATS: tuple[tuple[int, bytes, Callable[[BinaryIO], Header | None]], ...] = (
    (0, PNG, _png),
    (0, b"\xff\xd8", _jpeg),
    (0, b"BM", _bmp),
    (0, b"II*\0", _tiff),
    (0, b"MM\0*", _tiff),
    (0, b"II+\0", _tiff),
    (0, b"MM\0+", _tiff),
    (0, b"GIF8", _gif),
    (0, b"RIFF", _webp),
    (0, b"\0\0\0\x0cjP  ", _jp2),
    (0, b"\xff\x4f\xff\x51", partial(_codestream, 0)),
    (4, b"ftyp", _avif),
    *((0, f"P{form}".encode(), _pnm) for form in range(1, 7)),
)
