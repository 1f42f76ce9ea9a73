"""What a process pays before it works: imports, the first detection."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from bench.comparison import Comparison
from yolov7 import load_model
from yolov7.benchmark.clock import Run

FIRST_DETECTION = """
from importlib.resources import files
from yolov7 import Detector
image = sorted((files("yolov7.assets") / "images").glob("*.jpg"))[0]
assert Detector(device="cpu")(str(image))
"""
FIRST_FORWARD = """
import sys, torch
torch.jit.load(sys.argv[1])(torch.rand(1, 3, 320, 320))
"""


def fresh(code: str, *arguments: str) -> Run:
    """A new interpreter that runs some code, the working tree's packages first."""
    paths = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}

    def run() -> None:
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment)

    return run


def bench_import(compete: Comparison) -> None:
    """`import yolov7` and `import torch`, without which neither model nor kernel can be."""
    runs = {"ours": fresh("import yolov7"), "torch": fresh("import torch")}
    compete(runs, agree=None)


def bench_first_detection(compete: Comparison, tmp_path: Path) -> None:
    """From nothing to boxes: the embedded weights on one image; torch alone runs the network."""
    path = str(tmp_path / "network.pt")
    with torch.no_grad():
        network = load_model().fuse()
        torch.jit.trace(network, torch.rand(1, 3, 320, 320), check_trace=False).save(path)
    runs = {"ours": fresh(FIRST_DETECTION), "torch": fresh(FIRST_FORWARD, path)}
    compete(runs, agree=None)
