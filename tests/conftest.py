import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)  # two workers share two cores
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the processes that tests start, too

# The first example pays for imports and warm-up: wall-clock deadlines would fail at random.
settings.register_profile("no-deadline", deadline=None)
settings.load_profile("no-deadline")


@pytest.fixture(scope="session")
def reference_dir() -> Path:
    """The folder of reference numbers: YOLOV7_REFERENCE, else the copy in the repository."""
    return reference_folder()


def reference_folder() -> Path:
    return Path(os.environ.get("YOLOV7_REFERENCE") or Path(__file__).parent / "reference" / "data")


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, YOLOV7_DATA."""
    folder = os.environ.get("YOLOV7_DATA")
    if not folder:
        pytest.skip("YOLOV7_DATA names no folder of real data sets")
    return Path(folder)
