"""`batched_nms` gives the stored boxes, exactly and in order."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import reference_folder
from yolov7.kernels.nms import batched_nms

CASES = sorted((reference_folder() / "nms").glob("*.npz"))


def test_cases_found() -> None:
    assert CASES


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.stem)
def test_same_boxes(case: Path) -> None:
    with np.load(case) as data:
        prediction = torch.from_numpy(data["prediction"])
        options = sorted(name for name in data.files if name.startswith("opt") and "_" not in name)
        assert options
        for option in options:
            settings = json.loads(str(data[option]))
            classes = settings.get("classes")
            found = batched_nms(
                prediction,
                conf=settings["conf_thres"],
                iou=settings["iou_thres"],
                multi_label=settings.get("multi_label", False),
                agnostic=settings.get("agnostic", False),
                classes=None if classes is None else torch.tensor(classes),
            )
            for image in range(len(prediction)):
                expected = torch.from_numpy(data[f"{option}_image{image}"])
                name = f"{case.stem} {settings} image {image}"
                assert found.counts[image] == len(expected), name
                assert torch.equal(found.boxes[image, : len(expected)], expected), name
                assert not found.boxes[image, len(expected) :].any(), name
