"""The authors' checkpoint files, where YOLOV7_REFERENCE has them."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import reference_folder
from tests.reference.test_forward import assert_close
from yolov7.checkpoint import load_model
from yolov7.kernels.nms import batched_nms

NOWHERE = pytest.param(None, marks=pytest.mark.skip("set YOLOV7_REFERENCE to a folder with them"))
CASES = sorted((reference_folder() / "checkpoints").glob("*.pt"))


@pytest.mark.parametrize("path", CASES or [NOWHERE], ids=lambda p: p.stem if p else "none")
def test_decoded_output_and_detections_match(path: Path) -> None:
    numbers = np.load(path.with_suffix(".npz"))
    model = load_model(path)
    with torch.inference_mode():
        decoded = model(torch.from_numpy(numbers["input"]).float())
        assert_close("decoded", decoded, numbers["decoded"])
        fused = model.fuse()(torch.from_numpy(numbers["input"]).float())
    assert_close("fused", fused, numbers["decoded"])
    if "detections" in numbers:
        found = batched_nms(decoded, conf=0.25, iou=0.45)
        count = int(found.counts[0])
        theirs = numbers["detections"]
        assert count == len(theirs)
        np.testing.assert_allclose(found.boxes[0, :count].numpy(), theirs, rtol=1e-4, atol=1e-3)
