from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
import yaml

from yolov7.train import loop
from yolov7.train.options import Train

SIZE = 64
COLOURS = ((40, 60, 230), (230, 120, 30))


def write_split(folder: Path, split: str, images: int) -> None:
    """Images of one or two rectangles on noise, the class being the colour; the last has none."""
    generator = np.random.default_rng(sum(map(ord, split)))
    for part in ("images", "labels"):
        (folder / part / split).mkdir(parents=True)
    for i in range(images):
        image = generator.integers(90, 130, (SIZE, SIZE, 3), np.uint8)
        lines = []
        for class_ in range(0 if i == images - 1 else 1 + i % 2):
            x, y = generator.integers(0, 32, 2)
            w, h = generator.integers(16, 32, 2)
            image[y : y + h, x : x + w] = COLOURS[class_]
            box = np.array([x + w / 2, y + h / 2, w, h]) / SIZE
            lines.append(f"{class_} " + " ".join(f"{v:.6f}" for v in box))
        cv2.imwrite(str(folder / "images" / split / f"{i:03}.png"), image)
        (folder / "labels" / split / f"{i:03}.txt").write_text("\n".join(lines))


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data.yaml with two classes of rectangles, 8 images to train on and 4 to evaluate."""
    folder = tmp_path_factory.mktemp("shapes")
    write_split(folder, "train", 8)
    write_split(folder, "val", 4)
    spec = {"path": ".", "train": "images/train", "val": "images/val", "names": ["red", "blue"]}
    path = folder / "data.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture
def options(shapes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Train:
    """A run that takes a second."""
    monkeypatch.setenv("YOLOV7_CACHE", str(tmp_path / "cache"))
    return Train(
        data=str(shapes),
        imgsz=SIZE,
        width=0.125,
        epochs=2,
        batch=4,
        workers=0,
        set={"warmup_epochs": 100.0},  # a step for every batch
        device="cpu",
        project=str(tmp_path / "runs"),
        name="run",
    )


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "can_plot", lambda: False)
