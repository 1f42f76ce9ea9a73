"""The guard: what it says of times, and that it sees an operation that became slower."""

import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from bench.compare import Answer, compare, decide, main, run_both, unpack
from bench.results import ROOT
from bench.turns import busy

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


def test_waiting_keeps_no_processor_busy() -> None:
    assert busy(lambda: time.sleep(0.05)) < 0.04


def planted(tree: Path, source: str, old: str, new: str) -> Path:
    """A copy of the packages in which a piece of source is another."""
    ignored = shutil.ignore_patterns("__pycache__", "results", "*.safetensors")
    for name in ("bench", "kernels", "yolov7"):
        shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=ignored)
    (tree / "train").symlink_to(ROOT / "train")
    path = tree / source
    text = path.read_text()
    assert text.count(old) == 1
    path.write_text(text.replace(old, new))
    return tree


CALL = "Detections(*nms_op(prediction, segment_counts, classes, frames, *arguments))"
SLOWER = f"""
    import time
    started = time.perf_counter()
    result = {CALL}
    spent = time.perf_counter() - started
    while time.perf_counter() - started < 1.2 * spent:
        pass
    return result
"""


def test_operation_slowed_by_a_fifth_is_worse(tmp_path: Path) -> None:
    """And what the base does not have is inconclusive."""
    source = "kernels/nms/__init__.py"
    slow = planted(tmp_path / "head", source, f"    return {CALL}\n", SLOWER)
    old = "from yolov7.kernels.letterbox import letterbox\n"
    base = planted(tmp_path / "base", "bench/bench_letterbox.py", old, "import no_such_module\n")
    suites = ["bench/bench_nms.py::bench_nms[batch 1, conf 0.25]", "bench/bench_letterbox.py"]
    slower, lacking = run_both(base, slow, suites)
    assert slower.verdict == "worse", slower
    assert slower.low > 1.05
    assert (lacking.verdict, lacking.reason) == ("inconclusive", "base: is not there")


def test_worse_is_confirmed_by_fresh_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict that does not come again is none."""
    first = [Answer("a", "worse", 1.1), Answer("b", "same"), Answer("c", "worse", 1.3)]
    runs = {("bench",): first, ("a", "c"): [Answer("a", "worse", 1.2), Answer("c", "same", 1.0)]}
    monkeypatch.setattr("bench.compare.run_both", lambda _base, _head, targets: runs[(*targets,)])
    answers = compare(ROOT, ROOT)
    assert [answer.verdict for answer in answers] == ["worse", "same", "inconclusive"]
    assert answers[2].reason == "worse, but not again"


@pytest.mark.parametrize(("verdict", "code"), [("worse", 1), ("better", 0), ("inconclusive", 0)])
def test_exit_code(verdict: str, code: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bench.compare.unpack", lambda _ref, _folder: None)
    answers = [Answer("a", "same"), Answer("b[1]", verdict, 1.1, 1.2, 2.0, 2.3, 10)]
    monkeypatch.setattr("bench.compare.compare", lambda _base, _head, _targets: answers)
    assert main(["HEAD"]) == code


def test_base_is_unpacked_with_our_yardstick(tmp_path: Path) -> None:
    unpack("HEAD", tmp_path)
    assert (tmp_path / "yolov7" / "kernels").is_symlink()
    for name in ("bench/compare.py", "yolov7/benchmark/clock.py"):
        assert (tmp_path / name).read_text() == (ROOT / name).read_text()


def test_unknown_ref(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["no-such-ref"])
    assert "no-such-ref" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no-such-ref"):
        unpack("no-such-ref", tmp_path)
