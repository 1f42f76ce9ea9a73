"""Machines without Triton, `resource` and `fcntl`, whose processes are spawned: macOS, Windows."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.yolov7.data_sets import yolo_data

# In a module that spawned workers import as their main one, too.
WITHOUT = """
import sys

class Without:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("triton", "resource", "fcntl"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Without())
for name in [n for n in sys.modules if n.split(".")[0] in ("triton", "resource", "fcntl")]:
    del sys.modules[name]
"""
RUN = """
if __name__ == "__main__":
    import multiprocessing
    multiprocessing.set_start_method("spawn")
    import torch
    torch.set_num_threads(1)
    from yolov7.cli import main
    code = main(sys.argv[1:])
    assert not [name for name in sys.modules if name.split(".")[0] == "triton"]
    sys.exit(code)
"""
SMALL = "--variant yolov7-tiny --multiplier 0.125 --imgsz 64 --batch 2 --epochs 1 --workers 1"


@pytest.mark.parametrize(
    "words",
    [
        "predict --imgsz 64",
        "val --data set --imgsz 64 --weights small",
        f"train --data set --split val {SMALL}",
        "export --imgsz 64 --output x.onnx",
        "bench --engines eager graph --imgsz 64 --rounds 1 --device cpu",
        "info yolov7 --plan",
    ],
    ids=lambda words: words.split()[0],
)
def test_every_verb_works(words: str, tmp_path: Path) -> None:
    if words.startswith("export"):
        pytest.importorskip("onnxscript")
    yolo_data(tmp_path / "set")
    script = tmp_path / "run.py"
    script.write_text(WITHOUT + RUN)
    if "small" in words:
        from yolov7 import create_model, save_model

        save_model(create_model("yolov7-tiny", 2, width=0.125), tmp_path / "small.safetensors")
        words = words.replace("small", "small.safetensors")
    command = [sys.executable, str(script), *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout
