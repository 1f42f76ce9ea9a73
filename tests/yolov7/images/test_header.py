import struct
from collections.abc import Callable
from functools import partial
from io import BytesIO

import cv2
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from yolov7.images.header import FORMATS, read_header

HEIGHT, WIDTH = 40, 300  # 300 needs two bytes


def encode(suffix: str) -> bytes:
    shape = (HEIGHT, WIDTH) if suffix in (".pgm", ".pbm") else (HEIGHT, WIDTH, 3)
    return cv2.imencode(suffix, np.zeros(shape, np.uint8))[1].tobytes()


def animation() -> bytes:
    """A WebP of several frames, which says its size in another place than one of one frame."""
    frames = cv2.Animation()
    frames.frames = [np.full((HEIGHT, WIDTH, 3), grey, np.uint8) for grey in (0, 255)]
    frames.durations = [10, 10]
    return bytes(cv2.imencodeanimation(".webp", frames)[1])


def topdown_bmp() -> bytes:
    data = encode(".bmp")
    return data[:22] + struct.pack("<i", -HEIGHT) + data[26:]


def os2_bmp() -> bytes:
    header = struct.pack("<IHHHH", 12, WIDTH, HEIGHT, 1, 24)
    pixels = bytes(3 * WIDTH * HEIGHT)
    return b"BM" + struct.pack("<IHHI", 26 + len(pixels), 0, 0, 26) + header + pixels


def tiff(order: str, *, big: bool = False) -> bytes:
    """One black strip; the directory follows it. The width is a SHORT, the height a LONG."""
    start, pixels = 16, bytes(WIDTH * HEIGHT)
    rows = [(256, 3, WIDTH), (257, 4, HEIGHT), (258, 3, 8), (259, 3, 1), (262, 3, 1)]
    rows += [(273, 4, start), (277, 3, 1), (278, 4, HEIGHT), (279, 4, len(pixels))]
    count, entry, room = ("Q", "HHQ", 8) if big else ("H", "HHI", 4)
    directory = struct.pack(order + count, len(rows))
    for tag, kind, value in rows:
        field = struct.pack(order + {3: "H", 4: "I"}[kind], value)
        directory += struct.pack(order + entry, tag, kind, 1) + field.ljust(room, b"\0")
    end = start + len(pixels)
    head = {"<": b"II", ">": b"MM"}[order]
    head += struct.pack(order + ("HHHQ" if big else "HI"), *((43, 8, 0, end) if big else (42, end)))
    return head.ljust(start, b"\0") + pixels + directory + bytes(8)


def padded_jpeg() -> bytes:
    """Fill bytes, a marker without a length and stray bytes before the frame, as libjpeg skips."""
    data = encode(".jpg")
    at = data.index(b"\xff\xdb")
    return data[:at] + b"\xff\xff\xff\xd0\x00\x11\xff\x00" + data[at:]


def codestream() -> bytes:
    data = encode(".jp2")
    return data[data.index(b"\xff\x4f\xff\x51") :]


def long_box_jp2() -> bytes:
    """A box of 64-bit length in front of the picture."""
    data = encode(".jp2")
    at = data.index(b"jp2c") - 4
    return data[:at] + struct.pack(">I4sQ", 1, b"free", 20) + bytes(4) + data[at:]


FILES: dict[str, Callable[[], bytes]] = {
    **{name: partial(encode, name) for name in (".png", ".jpg", ".bmp", ".tiff", ".gif")},
    **{name: partial(encode, name) for name in (".jp2", ".ppm", ".pgm", ".pbm", ".webp", ".avif")},
    "animated webp": animation,
    "bmp from above": topdown_bmp,
    "os/2 bmp": os2_bmp,
    "little-endian tiff": partial(tiff, "<"),
    "big-endian tiff": partial(tiff, ">"),
    "bigtiff": partial(tiff, "<", big=True),
    "padded jpeg": padded_jpeg,
    "jpeg 2000 codestream": codestream,
    "jpeg 2000 with a long box": long_box_jp2,
}


ENCODED = {name: make() for name, make in FILES.items()}


@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
def test_the_size_is_that_which_the_decoder_sees(make: Callable[[], bytes]) -> None:
    data = make()
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    header = read_header(BytesIO(data))
    assert image is not None
    assert header is not None
    assert image.shape[:2] == (HEIGHT, WIDTH)
    assert (header.height, header.width) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("make", FILES.values(), ids=FILES.keys())
def test_a_file_that_is_cut_short_has_a_right_header_or_none(make: Callable[[], bytes]) -> None:
    data = make()
    for end in [*range(min(len(data), 700)), len(data) - 1]:
        header = read_header(BytesIO(data[:end]))
        assert header is None or (header.height, header.width) == (HEIGHT, WIDTH)


def avif_turned(turns: int) -> bytes:
    """An AVIF whose decoder does not apply the quarter turns of its `irot` box."""
    data = encode(".avif")
    at = data.index(b"ispe") - 4
    length = int.from_bytes(data[at : at + 4])
    box = struct.pack(">I4sB", 9, b"irot", turns)
    for name in (b"ipco", b"iprp", b"meta"):
        place = data.index(name) - 4
        size = int.from_bytes(data[place : place + 4]) + len(box)
        data = data[:place] + size.to_bytes(4) + data[place + 4 :]
    return data[: at + length] + box + data[at + length :]


@pytest.mark.parametrize(("turns", "orientation"), [(0, 1), (1, 8), (2, 3), (3, 6)])
def test_avif_says_how_it_is_turned(turns: int, orientation: int) -> None:
    header = read_header(BytesIO(avif_turned(turns)))
    assert header is not None
    assert header.orientation == orientation
    assert header.upright == ((WIDTH, HEIGHT) if turns % 2 else (HEIGHT, WIDTH))


@given(st.sampled_from([bytes(at) + mark for at, mark, _ in FORMATS]), st.binary(max_size=200))
def test_whatever_follows_the_first_bytes_is_borne(start: bytes, rest: bytes) -> None:
    header = read_header(BytesIO(start + rest))
    assert header is None or min(header.height, header.width) > 0


@given(st.sampled_from(sorted(FILES)), st.integers(0, 400), st.binary(min_size=1, max_size=8))
@example(
    "padded jpeg", ENCODED["padded jpeg"].index(b"\xff\xc0") + 11, b"\0\0\2\0\1\3\0"
)  # no factors
def test_whatever_is_changed_in_a_file_is_borne(name: str, at: int, change: bytes) -> None:
    data = ENCODED[name]
    header = read_header(BytesIO(data[:at] + change + data[at + len(change) :]))
    assert header is None or min(header.height, header.width) > 0
