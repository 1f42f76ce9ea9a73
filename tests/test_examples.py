"""The examples run: on a video in the place of a camera, on two Ray workers of which one dies."""

import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

import yolov7
from tests.yolov7.pictures import write_video

EXAMPLES = Path(__file__).parents[1] / "examples"
SAMPLES = Path(yolov7.__file__).parent / "assets/images"


def test_a_camera(tmp_path: Path) -> None:
    clip = write_video(tmp_path / "clip.avi", 5)
    command = [sys.executable, str(EXAMPLES / "camera.py"), str(clip), "blood-cells"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    *frames, last = run.stdout.splitlines()
    assert len([line for line in frames if line.startswith("frame ")]) == 5
    assert "boxes; pre " in frames[0]
    assert "p50/p99 ms" in last
    assert last.endswith("0 frames dropped")


FIRST = "        errors: list[Exception] = []\n"  # of what a worker does with a batch
DIES = """        marker = __import__("pathlib").Path({folder!r}, "died")
        if not marker.exists():
            marker.touch()
            __import__("os")._exit(1)
"""


def test_a_large_collection_on_workers_of_which_one_dies(tmp_path: Path) -> None:
    pytest.importorskip("ray.data", reason="Ray is not installed")
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    photos = tmp_path / "photos"
    photos.mkdir()
    for sample in sorted(SAMPLES.glob("*.jpg"))[:2]:
        (photos / sample.name).write_bytes(sample.read_bytes())
    cv2.imwrite(str(photos / "nothing.png"), np.full((64, 64, 3), 114, np.uint8))
    (photos / "broken.jpg").write_bytes(b"no image")
    source = (EXAMPLES / "ray_batch.py").read_text()
    assert FIRST in source
    script = tmp_path / "dying.py"
    script.write_text(source.replace(FIRST, DIES.format(folder=str(tmp_path)) + FIRST))
    command = [sys.executable, str(script), str(photos), str(tmp_path / "boxes"), "blood-cells"]
    subprocess.run(command, check=True, timeout=600, capture_output=True)
    assert (tmp_path / "died").exists()
    rows = pandas.read_parquet(tmp_path / "boxes")
    found = rows[rows.error == ""]
    assert set(found["class"]) == {"RBC", "WBC", "Platelets"}
    assert {Path(path).name for path in found.path} == {
        path.name for path in sorted(SAMPLES.glob("*.jpg"))[:2]
    }
    (broken,) = rows[rows.error != ""].error
    assert "broken.jpg: truncated, or not an image" in broken
