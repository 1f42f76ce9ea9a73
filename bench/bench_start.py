"""What a process pays before it works: imports, the first detection."""

import os
import subprocess
import sys
from pathlib import Path

from bench.comparison import Comparison, bodies
from bench.race import Run

FIRST_DETECTION = """
from importlib.resources import files
from yolov7 import Detector
image = sorted((files("yolov7.assets") / "images").glob("*.jpg"))[0]
assert Detector()(str(image))
"""


def fresh(code: str) -> Run:
    """A new interpreter that runs some code, the working tree's packages first."""
    paths = os.pathsep.join(filter(None, (str(Path.cwd()), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths}

    def run() -> None:
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)

    return run


@bodies("torch")
def bench_import(compete: Comparison) -> None:
    """`import yolov7` and `import torch`, without which neither model nor kernel can be."""
    runs = {"ours": fresh("import yolov7"), "torch": fresh("import torch")}
    compete(lambda: runs, agree=None)


@bodies()
def bench_first_detection(compete: Comparison) -> None:
    """From nothing to boxes: the embedded weights on one image."""
    compete(lambda: {"ours": fresh(FIRST_DETECTION)}, agree=None)
