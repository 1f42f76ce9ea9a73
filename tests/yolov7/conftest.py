from pathlib import Path

import pytest

from tests.yolov7.pictures import SAMPLES
from yolov7.images import read_image
from yolov7.letterbox import Image


@pytest.fixture(scope="module")
def images() -> list[Image]:
    """The sample images."""
    return [read_image(path) for path in SAMPLES]


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the cache is, empty; other folders of data sets than the test's are not looked at."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("YOLOV7_CACHE", str(folder))
    monkeypatch.delenv("YOLOV7_DATASETS", raising=False)
    return folder
