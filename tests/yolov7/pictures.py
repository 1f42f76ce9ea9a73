"""Small pictures and videos for tests."""

from importlib.resources import files
from pathlib import Path

import cv2
import numpy as np

from yolov7.letterbox import Image
from yolov7.sources import Source

SAMPLES = sorted(Path(str(files("yolov7.assets") / "images")).glob("*.jpg"))


def picture(height: int = 12, width: int = 20) -> Image:
    """Blue rises to the right, green downwards; red is 200."""
    image = np.full((height, width, 3), 200, np.uint8)
    image[:, :, 0] = np.linspace(0, 255, width, dtype=np.uint8)
    image[:, :, 1] = np.linspace(0, 255, height, dtype=np.uint8)[:, None]
    return image


def png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def write_video(path: Path, frames: int, fourcc: str = "MJPG") -> Path:
    """Frame i is uniformly grey, 20 i."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*fourcc), 10.0, (64, 48))
    for index in range(frames):
        writer.write(np.full((48, 64, 3), 20 * index % 256, np.uint8))
    writer.release()
    return path


def greys(source: Source) -> list[int]:
    return [round(float(frame.image.mean()) / 20) for frame in source]
