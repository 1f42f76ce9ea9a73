"""How workers start, on machines that lack what Linux has."""

import os
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from yolov7.images import read_image
from yolov7.train.options import Train
from yolov7.train.report import read_rows

# Modules that Windows, macOS or a bare installation have not got.
MISSING = """
import sys
for name in ("resource", "fcntl", "triton"):
    sys.modules[name] = None
import multiprocessing
multiprocessing.set_start_method("{method}")
import torch
torch.set_num_threads(1)
from yolov7.train import loop
loop.can_plot = lambda: False
"""

SCRIPT = """
from yolov7.train.loop import train
from yolov7.train.options import Train
train(Train(**{options}))
"""

COMMAND = """
from yolov7.cli import main
sys.exit(main({words}))
"""

AUGMENTED = """
from yolov7.train.loop import train
from yolov7.train.options import Train

def augment(scene, rng):
    scene.image[:] = 0
    return scene

if __name__ == "__main__":
    train(Train(**{options}), augment=augment)
"""

LAMBDA = """
from yolov7.errors import UserError
from yolov7.train.loop import train
from yolov7.train.options import Train
try:
    train(Train(**{options}), augment=lambda scene, rng: scene)
except UserError as error:
    print(error)
"""


@pytest.fixture
def spawned(options: Train) -> Train:
    """Two steps, images by one worker."""
    return replace(options, epochs=1, workers=1)


def run(file: Path, text: str) -> subprocess.CompletedProcess[str]:
    file.write_text(text)
    return subprocess.run(
        [sys.executable, str(file)],
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_a_script_without_a_guard_trains(method: str, spawned: Train, tmp_path: Path) -> None:
    text = MISSING.format(method=method) + SCRIPT.format(options=asdict(spawned))
    done = run(tmp_path / "script.py", text)
    assert done.returncode == 0, done.stderr
    (row,) = read_rows(Path(spawned.project) / "run" / "results.csv")
    assert row["matches"] > 0
    assert row["memory_gb"] != row["memory_gb"]  # NaN: not to be known


def test_the_command_trains(spawned: Train, tmp_path: Path) -> None:
    words = [
        *("train", "--data", spawned.data, "--imgsz", "64", "--width", "0.125", "--epochs", "1"),
        *("--batch", "4", "--workers", "1", "--device", "cpu", "--project", spawned.project),
    ]
    done = run(tmp_path / "run.py", MISSING.format(method="spawn") + COMMAND.format(words=words))
    assert done.returncode == 0, done.stderr
    assert "all epochs are done: 1 epochs" in done.stdout


def test_an_augmentation_of_the_script_reaches_the_workers(spawned: Train, tmp_path: Path) -> None:
    text = AUGMENTED.format(options=asdict(spawned))
    done = run(
        tmp_path / "script.py",
        "import multiprocessing\n"
        + text.replace(
            'if __name__ == "__main__":',
            'if __name__ == "__main__":\n    multiprocessing.set_start_method("spawn")',
        ),
    )
    assert done.returncode == 0, done.stderr
    picture = read_image(Path(spawned.project) / "run" / "train_batch0.jpg")
    assert np.median(picture) < 3  # black, with boxes drawn


def test_an_augmentation_that_cannot_be_sent_is_one_line(spawned: Train, tmp_path: Path) -> None:
    text = MISSING.format(method="spawn") + LAMBDA.format(options=asdict(spawned))
    done = run(tmp_path / "script.py", text)
    assert done.returncode == 0, done.stderr
    assert "augment cannot be sent to the workers (" in done.stdout
    assert "define it at the top of a module, or use workers=0" in done.stdout
