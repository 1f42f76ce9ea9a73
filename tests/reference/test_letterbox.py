"""The letterbox, bit for bit against the authors' implementation."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import reference_folder
from yolov7.letterbox import letterbox, letterbox_geometry

CASES = sorted((reference_folder() / "letterbox").glob("*.npz"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_equals_the_reference_bit_for_bit(path: Path) -> None:
    case = np.load(path)
    geometry = letterbox_geometry(
        case["input"].shape[:2],
        int(case["size"]),
        stride=int(case["stride"]),
        auto=bool(case["auto"]),
        scaleup=bool(case["scaleup"]),
    )
    np.testing.assert_array_equal(letterbox(case["input"], geometry), case["output"])
    np.testing.assert_array_equal(geometry.ratio, case["ratio"])
    np.testing.assert_array_equal(geometry.pad, case["pad"])


def test_there_are_cases() -> None:
    assert CASES
