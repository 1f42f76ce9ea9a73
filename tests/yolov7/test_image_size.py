from pathlib import Path

import cv2
import numpy as np
import pytest

from tests.yolov7.data_sets import HEIGHT, WIDTH, write_image
from yolov7.dataset import image_size as image_size_module
from yolov7.dataset.image_size import image_size
from yolov7.sources import read_image


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
    monkeypatch.setattr(image_size_module, "read_image", None)  # the header must do
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
def test_an_exif_record_that_only_the_decoder_understands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    if suffix == ".jpg":
        path = exif_jpeg(tmp_path / "x.jpg", 6)
        path.write_bytes(path.read_bytes().replace(b"Exif\0\0MM", b"Exif\0\0??"))
    else:
        path = write_image(tmp_path / "x.png")
        data = path.read_bytes()
        at = data.index(b"IDAT") - 4
        path.write_bytes(data[:at] + bytes(4) + b"eXIf" + bytes(4) + data[at:])
    monkeypatch.setattr(image_size_module, "read_image", lambda _: np.zeros((3, 5, 3), np.uint8))
    assert image_size(path) == (3, 5)


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

    monkeypatch.setattr(image_size_module, "read_image", read)
    assert image_size(path) == (3, 5)
    assert asked == [path]
