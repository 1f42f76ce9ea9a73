"""The training form's forward pass against the authors' implementation."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import reference_folder
from yolov7.model import YOLOv7, create_model

CASES = sorted((reference_folder() / "forward").glob("*.npz"))


def formula_weights(model: YOLOv7, names: list[str], bn_stats: np.ndarray) -> None:
    """Fill the model as `forward/` of the reference's README says: a formula on official names."""
    state = {k: v for k, v in model.state_dict().items() if k != "head.anchors"}
    names = [n for n in names if "anchor" not in n]
    assert len(names) == len(state)
    by_name = dict(zip(names, state.values(), strict=True))
    offset = 0
    for name in sorted(n for n in names if n.endswith(("running_mean", "running_var"))):
        size = by_name[name].numel()
        by_name[name].copy_(torch.from_numpy(bn_stats[offset : offset + size]))
        offset += size
    assert offset == len(bn_stats)
    for name, tensor in by_name.items():
        if name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            continue
        r = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(tensor.shape))
        if ".ia." in name:
            value = 0.02 * r
        elif ".im." in name:
            value = 1 + 0.02 * r
        elif r.ndim == 4:
            value = r / np.sqrt(r[0].size)
        elif name.endswith("weight"):
            value = 1 + 0.1 * r
        else:
            value = 0.1 * r
        tensor.copy_(torch.from_numpy(value.astype(np.float32)))


def assert_close(name: str, ours: torch.Tensor, theirs: np.ndarray) -> None:
    a, b = ours.double().numpy(), theirs.astype(np.float64)
    assert a.shape == b.shape, name
    assert np.isfinite(a).all(), name
    rms = np.sqrt(((a - b) ** 2).mean() / (b**2).mean())
    worst = np.abs(a - b).max() / np.abs(b).max()
    assert rms <= 1e-4, f"{name}: relative RMS {rms:.2e}"
    assert worst <= 1e-3, f"{name}: largest difference {worst:.2e}"


@pytest.mark.parametrize("case", CASES, ids=lambda p: p.stem)
def test_forward_and_fused_forward_match(case: Path, reference_dir: Path) -> None:
    architecture = json.loads((reference_dir / "architectures" / f"{case.stem}.json").read_text())
    numbers = np.load(case)
    model = create_model(case.stem).eval()
    formula_weights(model, list(architecture["training"]["tensors"]), numbers["bn_stats"])
    x = torch.from_numpy(numbers["input"])
    with torch.inference_mode():
        decoded, raw = model(x, raw=True)
        assert_close("decoded", decoded, numbers["decoded"])
        heads = sorted(k for k in numbers.files if k.startswith("head"))
        assert heads
        for head in heads:
            assert_close(head, raw[int(head.removeprefix("head"))], numbers[head])
        assert_close("fused", model.fuse()(x), numbers["decoded"])


def test_there_are_cases() -> None:
    assert CASES
