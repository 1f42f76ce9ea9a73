"""The guard: what it says of times, and that it sees an operation that became slower."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from bench.compare import compare, decide, main, unpack
from bench.results import ROOT

GENERATOR = np.random.default_rng(0)


def seconds(factor: float, noise: float, rounds: int = 40) -> tuple[list[float], list[float]]:
    """Times of two trees on a machine that drifts and stumbles, the new one slower by `factor`."""
    drift = np.linspace(1, 1.5, rounds)
    base, head = (drift * np.exp(noise * GENERATOR.standard_normal(rounds)) for _ in range(2))
    base[::7] *= 3
    return base.tolist(), (factor * head).tolist()


@pytest.mark.parametrize(
    ("factor", "noise", "verdict"),
    [
        (1.2, 0.05, "worse"),
        (0.8, 0.05, "better"),
        (1.0, 0.02, "same"),
        (1.03, 0.01, "same"),
        (1.06, 0.3, "inconclusive"),
        (1.0, 0.5, "inconclusive"),
    ],
)
def test_verdict(factor: float, noise: float, verdict: str) -> None:
    assert decide("nms", *seconds(factor, noise)).verdict == verdict


def test_equal_trees_are_hardly_ever_worse() -> None:
    verdicts = [decide("nms", *seconds(1.0, noise)).verdict for noise in (0.03, 0.1, 0.3) * 30]
    assert "worse" not in verdicts


def planted(tree: Path, source: str, old: str, new: str) -> Path:
    """A copy of the packages in which a piece of source is another."""
    for name in ("bench", "kernels", "yolov7"):
        ignored = shutil.ignore_patterns("__pycache__", "results", "assets")
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    (tree / "train").symlink_to(ROOT / "train")
    path = tree / source
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return tree


SLOWER = """
    import time
    started = time.perf_counter()
    result = Detections(*nms_op(prediction, segment_counts, classes, *arguments))
    spent = time.perf_counter() - started
    while time.perf_counter() - started < 1.2 * spent:
        pass
    return result
"""


def test_operation_slowed_by_a_fifth_is_worse(tmp_path: Path) -> None:
    old = "    return Detections(*nms_op(prediction, segment_counts, classes, *arguments))\n"
    slow = planted(tmp_path, "kernels/nms/__init__.py", old, SLOWER)
    suite = "bench/bench_nms.py::bench_nms[ours-batch 1, conf 0.25]"
    (answer,) = compare(ROOT, slow, [suite])
    assert answer.verdict == "worse", answer
    assert answer.low > 1.05


def test_benchmark_that_the_base_lacks(tmp_path: Path) -> None:
    broken = planted(tmp_path, "kernels/nms/__init__.py", "def batched_nms(", "def other_nms(")
    suite = "bench/bench_nms.py::bench_nms[ours-batch 1, conf 0.25]"
    (answer,) = compare(broken, ROOT, [suite])
    assert (answer.verdict, answer.reason) == ("inconclusive", "base: is not there")


def test_unknown_ref(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["no-such-ref"])
    assert "no-such-ref" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no-such-ref"):
        unpack("no-such-ref", tmp_path)
