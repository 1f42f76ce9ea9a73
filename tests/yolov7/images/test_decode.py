"""The gate: what is decoded, and what is refused before a decoder sees it."""

import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.yolov7.data_sets import linux
from tests.yolov7.pictures import picture, png
from yolov7.errors import UserError
from yolov7.images import decode, decode_image, image_size, read_image
from yolov7.images.header import read_header


def test_reads_colour_and_grey_and_drops_alpha(tmp_path: Path) -> None:
    image = picture()
    grey = image[:, :, 1]
    for name, pixels, expected in [
        ("colour", image, image),
        ("grey", grey, np.dstack([grey] * 3)),
        ("alpha", np.dstack([image, grey]), image),
    ]:
        (tmp_path / f"{name}.png").write_bytes(png(pixels))
        read = read_image(tmp_path / f"{name}.png")
        np.testing.assert_array_equal(read, expected)
        assert read.dtype == np.uint8
        assert read.flags.c_contiguous


def test_sixteen_bits_are_scaled_to_eight() -> None:
    wide = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert decode_image(png(wide), "wide")[0, :, 0].tolist() == [0, 1, 128, 255]
    assert decode_image(png(np.dstack([wide] * 4)), "wide")[0, :, 2].tolist() == [0, 1, 128, 255]


def test_turns_upright_by_exif(tmp_path: Path) -> None:
    jpeg = cv2.imencode(".jpg", np.full((8, 16, 3), 90, np.uint8))[1].tobytes()
    orientation = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    exif = b"Exif\0\0" + orientation
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2) + exif
    assert decode_image(jpeg[:2] + segment + jpeg[2:], "turned").shape == (16, 8, 3)


def test_one_pixel_and_very_large_images() -> None:
    assert decode_image(png(picture(1, 1)), "dot").shape == (1, 1, 3)
    huge = cv2.imencode(".png", np.zeros((9000, 12000), np.uint8), [cv2.IMWRITE_PNG_COMPRESSION, 1])
    assert decode_image(huge[1].tobytes(), "huge").shape == (9000, 12000, 3)


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".webp", ".bmp"])
def test_truncated_files_are_refused(
    tmp_path: Path, suffix: str, capfd: pytest.CaptureFixture[str]
) -> None:
    data = cv2.imencode(suffix, picture(64, 64))[1].tobytes()
    path = tmp_path / f"cut{suffix}"
    path.write_bytes(data[: len(data) * 2 // 3])
    with pytest.raises(UserError, match=f"cut{suffix}: truncated, or not an image"):
        read_image(path)


@pytest.mark.parametrize("data", [b"", b"hello", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"])
def test_other_files_are_refused(data: bytes) -> None:
    with pytest.raises(UserError, match=r"notes\.txt: truncated, or not an image"):
        decode_image(data, "notes.txt")


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".bmp", ".tiff", ".gif", ".jp2"])
def test_the_pixel_limit_is_checked_before_decoding(
    monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    data = cv2.imencode(suffix, picture(40, 35))[1].tobytes()
    monkeypatch.setattr(decode, "MAX_PIXELS", 1399)
    monkeypatch.setattr(cv2, "imdecode", lambda *_: pytest.fail("decoded"))
    with pytest.raises(UserError, match=r"big: .*over the limit"):
        decode_image(data, "big")
    monkeypatch.undo()
    monkeypatch.setattr(decode, "MAX_PIXELS", 1400)
    assert decode_image(data, "big").shape == (40, 35, 3)


def test_missing_and_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nothing.jpg: no such file: check the path"):
        read_image(tmp_path / "nothing.jpg")
    with pytest.raises(UserError, match="cannot be read"):
        read_image(tmp_path)


# What is hostile, or no image


def chunk(kind: bytes, body: bytes = b"", length: int | None = None) -> bytes:
    size = struct.pack(">I", len(body) if length is None else length)
    return size + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def header(height: int, width: int, bits: int = 8) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    )


def animated_png() -> bytes:
    """Ends OpenCV 4.12 to 5.0: a frame of an animation without a byte in it."""
    control = chunk(b"fcTL", struct.pack(">IIIIIHHBB", 0, 4, 4, 0, 0, 1, 1, 0, 0))
    picture = chunk(b"IDAT", zlib.compress(bytes((1 + 3 * 4) * 4)))
    animation = chunk(b"acTL", struct.pack(">II", 2, 0))
    return header(4, 4) + animation + picture + control + chunk(b"fdAT") + chunk(b"IEND")


def wide_png(side: int) -> bytes:
    """A 16-bit PNG that claims a size; of its pixels only the first row is there."""
    return header(side, side, 16) + chunk(b"IDAT", zlib.compress(bytes(6 * side))) + chunk(b"IEND")


def claiming(data: bytes, mark: bytes, behind: int, side: int) -> bytes:
    """A picture whose header claims another width and height, a few bytes behind a mark."""
    at = data.index(mark) + len(mark) + behind
    return data[:at] + struct.pack(">II", side, side) + data[at + 8 :]


def long_chunk() -> bytes:
    return header(1, 1) + chunk(b"IDAT", b"x", length=0xFFFFFFF0)


def many_scans() -> bytes:
    """A progressive JPEG whose last scan comes again and again, a few KB each time."""
    image = np.zeros((4000, 4000, 3), np.uint8)
    data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])[1].tobytes()
    last = data[data.rindex(b"\xff\xda") : -2]
    return data[:-2] + last * 2000 + data[-2:]


def small_but_wide(suffix: str, side: int, flags: tuple[int, ...] = ()) -> bytes:
    return cv2.imencode(suffix, np.zeros((side, side, 3), np.uint8), flags)[1].tobytes()


LIMITED = """
import resource, sys
from pathlib import Path
from yolov7.errors import UserError
from yolov7.images import decode_image
data = Path(sys.argv[1]).read_bytes()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    print("read", decode_image(data, "it").shape)
except UserError as error:
    print("refused", error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before >> 10)
"""

HOSTILE: dict[str, tuple[Callable[[], bytes], str]] = {
    "empty frame of an animation": (animated_png, "read (4, 4, 3)"),
    "chunk beyond the end": (long_chunk, "refused it: truncated"),
    "16 bits at the limit": (lambda: wide_png(9000), "refused it: 81 million pixels"),
    "JPEG 2000": (
        lambda: claiming(small_but_wide(".jp2", 64), b"\xff\x51", 4, 8000),
        "refused it: 64 million pixels",
    ),
    "AVIF": (
        lambda: claiming(small_but_wide(".avif", 8), b"ispe", 4, 7000),
        "refused it: 49 million pixels",
    ),
    "scans": (many_scans, "refused it: a JPEG of 2010 scans"),
    "Radiance": (lambda: b"#?RADIANCE\n-Y 99999 +X 99999\n", "refused it: a Radiance picture"),
}


@linux
@pytest.mark.parametrize(("make", "answer"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_files_are_harmless(tmp_path: Path, make: Callable[[], bytes], answer: str) -> None:
    path = tmp_path / "hostile"
    path.write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    said, taken_mb = done.stdout.splitlines()
    assert said.startswith(answer)
    assert int(taken_mb) < 100


@linux
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".bmp", ".tiff", ".ppm", ".jp2"])
def test_the_limit_on_memory_is_kept_while_decoding(tmp_path: Path, suffix: str) -> None:
    """A header's cost is what OpenCV takes at most, in a process of its own."""
    path = tmp_path / "x"
    path.write_bytes(small_but_wide(suffix, 3000))
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, path], capture_output=True, text=True, check=True
    )
    with path.open("rb") as file:
        found = read_header(file)
    assert found is not None
    assert int(done.stdout.splitlines()[1]) * 2**20 / 3000**2 <= found.cost + 0.5


@linux
def test_what_is_no_file_is_refused_by_its_kind(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "folder.jpg").mkdir()
    with (tmp_path / "sparse.jpg").open("wb") as file:
        file.truncate(2**42)
    for name, kind in (
        ("pipe.jpg", "a pipe"),
        ("device.jpg", "a device"),
        ("folder.jpg", "a folder"),
        ("sparse.jpg", "over the limit of 768 MB"),
        ("x" * 300, "File name too long"),
        ("nul\0.jpg", "null"),
    ):
        for read in (read_image, image_size):
            with pytest.raises(UserError, match=kind):
                read(tmp_path / name)


@pytest.mark.parametrize(
    ("start", "kind"),
    [
        (b"\0\0\0\x18ftypheic", "a HEIC picture"),
        (b"\0\0\0\x18ftypisom", "a video"),
        (b"v/1\x01\x02\0\0\0", "an OpenEXR picture"),
        (b"<svg xmlns=", "a text of markup"),
    ],
)
def test_formats_that_are_not_read_are_named(start: bytes, kind: str) -> None:
    with pytest.raises(UserError, match=f"x: {kind}.* which is not read here"):
        decode_image(start.ljust(40, b"\0"), "x")


@pytest.mark.parametrize(
    ("kind", "bits"), [(np.float32, "32-bit floating"), (np.int32, "32-bit signed")]
)
def test_a_tiff_of_other_numbers_says_which(kind: type, bits: str) -> None:
    data = cv2.imencode(".tiff", np.zeros((4, 6), kind))[1].tobytes()
    with pytest.raises(UserError, match=f"{bits} numbers: give 8 or 16 bits"):
        decode_image(data, "x")


def test_bytes_after_the_end_and_chunks_that_do_not_matter_change_nothing() -> None:
    data = png(picture())
    at = data.index(b"IDAT") - 4
    profile = chunk(b"iCCP", b"broken") + chunk(b"gAMA", struct.pack(">I", 99999))
    for changed in (data + bytes(100), data[:at] + profile + data[at:]):
        np.testing.assert_array_equal(decode_image(changed, "x"), picture())


def test_a_jpeg_shrinks_while_it_is_decoded_and_other_formats_do_not(tmp_path: Path) -> None:
    for suffix, shape in ((".jpg", (3, 5, 3)), (".png", (12, 20, 3))):
        path = tmp_path / f"x{suffix}"
        path.write_bytes(cv2.imencode(suffix, picture())[1].tobytes())
        assert read_image(path, shrink=4).shape == shape
