"""The cost model beside measured launches: what generated them is found again."""

import json
from pathlib import Path

import pytest
import torch

from bench import fit
from yolov7.engine.graph.workload import workload
from yolov7.kernels.conv import ConvConfig, ConvLaunch
from yolov7.kernels.conv.config import Entry, write_entries
from yolov7.kernels.conv.model import corners, timed
from yolov7.kernels.runtime import recording


def test_the_gpu_that_took_these_times_is_found(tmp_path: Path) -> None:
    path, entries = tmp_path / "conv.json", {}
    with recording((9, 0)):
        low = corners(torch.device("meta"))[0]
        true = low._replace(l2=6.5e12, memory=3.3e12, step=250.0, launch=3.1e-6)
        for batch in (1, 32):
            for launch in workload("yolov7", batch, "fp16")["launches"]:
                if isinstance(launch, ConvLaunch):
                    config = launch.chosen()
                    taken = timed(launch.calls, config)(true) * 1e6
                    entries[launch.key] = Entry(*launch.key, config, taken, 1)
    write_entries(path, entries, (9, 0), "Some_GPU")
    assert fit.main([str(path), "--json", str(tmp_path / "fit.json")]) == 0
    found = json.loads((tmp_path / "fit.json").read_text())
    for name in fit.FITTED:
        assert found["fitted"][name] == pytest.approx(getattr(true, name), rel=0.15), name
    assert found["error"]["fitted"] < 0.03 < found["error"]["middle"]
    rows = found["launches"]
    assert len(rows) > 60
    outside = [r for r in rows if not r["modelled"][0] <= r["measured"] <= r["modelled"][1]]
    assert found["inside"] == len(rows) - len(outside)
    assert outside  # a launch costs more than the model's most


def test_a_file_of_other_launches_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "conv.json"
    config = ConvConfig(block_m=64, block_n=64, block_k=32)
    entry = Entry("3x3s1-fp16", (1, 2, 3), config, 1.0, 1)
    write_entries(path, {entry.key: entry}, (9, 0), "Some_GPU")
    with pytest.raises(SystemExit):
        fit.main([str(path)])
    assert "no launch of yolov7 in it" in capsys.readouterr().err
