"""Training images: mosaics, augmented, on one core; files that the system holds in its memory."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from bench.comparison import Comparison
from bench.data import CLASSES, random_sample
from yolov7.benchmark.clock import Work
from yolov7.dataset import Dataset
from yolov7.train.config import PRESETS
from yolov7.train.data import TrainingData
from yolov7.train.images import CacheKind
from yolov7.train.sampler import Key

IMAGES, BOXES, DRAWN = 64, 8, 32
SIDE = 320
CASES = {
    "none": "mosaic at 320, files decoded, one core",
    "ram": "mosaic at 320, images in RAM, one core",
}


def pictures(folder: Path, count: int) -> Dataset:
    """JPEG files of 640 x 640 pixels with labelled boxes."""
    random = np.random.default_rng(0)
    samples = []
    for index in range(count):
        path = folder / f"{index}.jpg"
        coarse = random.integers(0, 256, (80, 80, 3), np.uint8)
        cv2.imwrite(str(path), cv2.resize(coarse, (640, 640), interpolation=cv2.INTER_CUBIC))
        samples.append(random_sample(path, index, 640, BOXES, random))
    return Dataset(samples, [f"class{i}" for i in range(CLASSES)], list(range(CLASSES)))


@pytest.mark.parametrize("cache", CASES, ids=CASES.values())
def bench_loader(cache: CacheKind, compete: Comparison, tmp_path: Path, smoke: bool) -> None:
    """Items of an epoch as a worker of the loader makes them."""
    dataset = pictures(tmp_path, 4 if smoke else IMAGES)
    data = TrainingData(dataset, SIDE, PRESETS["tiny"].augmentation, cache=cache)
    keys = [Key(0, i, i % len(dataset.samples), (SIDE, SIDE)) for i in range(DRAWN)]

    def run() -> None:
        threads = cv2.getNumThreads(), torch.get_num_threads()
        cv2.setNumThreads(0)
        torch.set_num_threads(1)
        for key in keys:
            data[key]
        cv2.setNumThreads(threads[0])
        torch.set_num_threads(threads[1])

    compete({"ours": run}, agree=None, work=Work(items=DRAWN))
