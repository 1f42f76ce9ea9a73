import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.yolov7.data_sets import HEIGHT, WIDTH, write_image
from yolov7.errors import UserError
from yolov7.images import decode, image_size, read_image


def exif_jpeg(path: Path, orientation: int, order: str = "big") -> Path:
    """A JPEG whose EXIF record, in either byte order, states an orientation."""
    short = {"big": ">", "little": "<"}[order]
    entry = np.array([0x0112, 3], f"{short}u2").tobytes() + np.array([1], f"{short}u4").tobytes()
    entry += np.array([orientation, 0], f"{short}u2").tobytes()
    tiff = (b"MM" if order == "big" else b"II") + np.array([42], f"{short}u2").tobytes()
    tiff += np.array([8], f"{short}u4").tobytes() + np.array([1], f"{short}u2").tobytes()
    body = b"Exif\0\0" + tiff + entry + bytes(4)
    plain = write_image(path).read_bytes()
    segment = b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body
    path.write_bytes(plain[:2] + segment + plain[2:])
    return path


@pytest.mark.parametrize("order", ["big", "little"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_size_is_that_of_the_upright_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, orientation: int, order: str
) -> None:
    path = exif_jpeg(tmp_path / "x.jpg", orientation, order)
    upright = read_image(path).shape[:2]
    monkeypatch.setattr(decode, "read_image", None)  # the header must do
    assert image_size(path) == upright
    assert upright == ((HEIGHT, WIDTH) if orientation < 5 else (WIDTH, HEIGHT))


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp", ".tiff", ".webp"])
def test_size_of_every_format(tmp_path: Path, suffix: str) -> None:
    assert image_size(write_image(tmp_path / f"x{suffix}")) == (HEIGHT, WIDTH)


def test_size_of_a_progressive_jpeg_and_of_one_with_bytes_after_its_end(tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    image = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_PROGRESSIVE, 1])
    path.write_bytes(path.read_bytes() + b"maker notes")
    assert image_size(path) == (HEIGHT, WIDTH)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_a_damaged_exif_record_turns_neither_the_size_nor_the_pixels(
    tmp_path: Path, suffix: str
) -> None:
    if suffix == ".jpg":
        path = exif_jpeg(tmp_path / "x.jpg", 6)
        path.write_bytes(path.read_bytes().replace(b"Exif\0\0MM", b"Exif\0\0??"))
    else:
        path = write_image(tmp_path / "x.png")
        data = path.read_bytes()
        at = data.index(b"IDAT") - 4
        path.write_bytes(data[:at] + bytes(4) + b"eXIf" + bytes(4) + data[at:])
    assert image_size(path) == read_image(path).shape[:2] == (HEIGHT, WIDTH)


@pytest.mark.parametrize("late", [False, True], ids=["before the pixels", "behind them"])
def test_a_png_is_turned_by_its_exif_chunk(tmp_path: Path, late: bool) -> None:
    path = write_image(tmp_path / "x.png")
    data = path.read_bytes()
    record = b"MM\0\x2a\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"
    chunk = len(record).to_bytes(4, "big") + b"eXIf" + record
    chunk += zlib.crc32(chunk[4:]).to_bytes(4, "big")
    at = data.index(b"IEND" if late else b"IDAT") - 4
    path.write_bytes(data[:at] + chunk + data[at:])
    assert image_size(path) == read_image(path).shape[:2] == (WIDTH, HEIGHT)


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
@pytest.mark.parametrize("share", [0, 0.02, 0.6])
def test_a_truncated_file_is_judged_by_the_reader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, share: float
) -> None:
    path = write_image(tmp_path / f"x{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    asked = []

    def read(path: Path) -> np.ndarray:
        asked.append(path)
        return np.zeros((3, 5, 3), np.uint8)

    monkeypatch.setattr(decode, "read_image", read)
    assert image_size(path) == (3, 5)
    assert asked == [path]


def test_the_end_mark_of_a_thumbnail_is_not_that_of_the_image(tmp_path: Path) -> None:
    path = exif_jpeg(tmp_path / "x.jpg", 1)
    data = path.read_bytes()
    thumbnail = b"\xff\xe2\x00\x0athumb\0\xff\xd9"
    whole = data[:2] + thumbnail + data[2:]
    path.write_bytes(whole)
    assert image_size(path) == (HEIGHT, WIDTH)
    path.write_bytes(whole[: len(whole) * 3 // 4])
    with pytest.raises(UserError, match="truncated"):
        image_size(path)
