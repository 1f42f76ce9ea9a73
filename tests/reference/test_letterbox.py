"""The letterbox, bit for bit against the authors' implementation."""

from pathlib import Path

import numpy as np
import pytest

from tests.conftest import reference_folder
from yolov7.letterbox import letterbox

CASES = sorted((reference_folder() / "letterbox").glob("*.npz"))


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_equals_the_reference_bit_for_bit(path: Path) -> None:
    case = np.load(path)
    image, ratio, pad = letterbox(
        case["input"],
        int(case["size"]),
        stride=int(case["stride"]),
        auto=bool(case["auto"]),
        scaleup=bool(case["scaleup"]),
    )
    np.testing.assert_array_equal(image, case["output"])
    np.testing.assert_array_equal(ratio, case["ratio"])
    np.testing.assert_array_equal(pad, case["pad"])


def test_there_are_cases() -> None:
    assert CASES
