"""Results: a row for each contender, a report for each run, the table that compares.

A report lies at ``bench/results/DEVICE/DATE-COMMIT.json``:
its fields are those of `Report`.
"""

import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

from yolov7.atomic import atomic
from yolov7.benchmark.clock import Work

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "triton", "numpy", "opencv-python", "torchvision", "onnxruntime", "openvino")
OURS = "ours"  # the contender that the others are held against
EVEN = 0.02  # ratios this close to 1 are neither a win nor a loss


@dataclass(frozen=True)
class Row:
    """What one contender took; zero is what was not counted.

    Attributes:
        suite: The benchmark's function.
        case: Sizes and options.
        body: The contender, `ours` or a baseline.
        turns: How often it was timed.
        p50_ms: Median.
        p99_ms: 99th percentile.
        tflops: 10^12 operations per second.
        gbps: 10^9 bytes per second, of the least traffic.
        ceiling_percent: Of the time that the work takes at the ceilings measured in the same run.
        images_per_s: Images per second.
        missing: Why it took no part.
    """

    suite: str
    case: str
    body: str
    turns: int = 0
    p50_ms: float = 0.0
    p99_ms: float = 0.0
    tflops: float = 0.0
    gbps: float = 0.0
    ceiling_percent: float = 0.0
    images_per_s: float = 0.0
    missing: str = ""

    @classmethod
    def of(
        cls,
        suite: str,
        case: str,
        body: str,
        seconds: Sequence[float],
        work: Work,
        share: float = 0.0,
    ) -> "Row":
        """From the seconds of its turns, the work of each, and the share of the ceilings' time."""
        median = statistics.median(seconds)
        return cls(
            suite,
            case,
            body,
            turns=len(seconds),
            p50_ms=median * 1e3,
            p99_ms=float(np.percentile(seconds, 99)) * 1e3,
            tflops=work.flops / median / 1e12,
            gbps=work.bytes / median / 1e9,
            ceiling_percent=100 * share,
            images_per_s=work.items / median,
        )

    def as_dict(self) -> dict[str, Any]:
        """Fields by name, numbers to five digits."""
        return {
            name: float(f"{value:.5g}") if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }

    def as_line(self) -> str:
        """JSON on a line."""
        return json.dumps(self.as_dict()) + "\n"


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """What a file with a JSON a line holds, if it is there; a line that was cut off is left out."""
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            yield json.loads(line)
        except json.JSONDecodeError:
            return


def read_rows(path: Path) -> list[Row]:
    """The rows of a file."""
    return [Row(**row) for row in json_lines(path)]


@dataclass
class Report:
    """One run on one machine.

    Attributes:
        environment: See `environment`.
        ceilings: What the machine reached, by name with its unit.
        rows: Of the suites.
        steps: Of the plan, timed one by one (on a GPU).
        checks: How many configs were compared with fp32, and which are wrong (on a GPU).
    """

    environment: dict[str, Any]
    ceilings: dict[str, float]
    rows: list[Row] = field(default_factory=list)
    steps: list[dict[str, Any]] = field(default_factory=list)
    checks: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, device: torch.device, rows: list[Row], ceilings: dict[str, float]) -> "Report":
        """Of this process's machine, now."""
        return cls(environment(device), ceilings, rows)

    @classmethod
    def load(cls, path: Path) -> "Report":
        """Read one."""
        content = json.loads(path.read_text())
        rows = [Row(**row) for row in content.pop("rows")]
        return cls(**content, rows=rows)

    def save(self, folder: Path = RESULTS) -> Path:
        """Write it where it belongs."""
        known = self.environment
        name = f"{known['date'][:10]}-{known['commit']}.json"
        path = folder / known["device"].replace(" ", "_") / name
        with atomic(path) as temporary:
            temporary.write_text(self.as_json())
        return path

    def as_json(self) -> str:
        """The file's content."""
        content = {**vars(self), "rows": [row.as_dict() for row in self.rows]}
        return json.dumps(content, indent=1) + "\n"

    def find(self, suite: str, case: str, body: str = OURS) -> Row | None:
        """The row of a contender that took part."""
        for row in self.rows:
            if (row.suite, row.case, row.body) == (suite, case, body) and not row.missing:
                return row
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """What a number needs to be had again: device, driver, versions, commit, clocks, date."""
    known: dict[str, Any] = {
        "device": _cpu_name(),
        "cores": _cores(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in PACKAGES if _version(name)},
        "commit": _git("rev-parse", "--short=12", "HEAD") or "unknown",
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    if device.type == "cuda":
        query = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.limit,temperature.gpu"
        known |= {
            "device": torch.cuda.get_device_name(device),
            "cuda": torch.version.cuda,
            "capability": list(torch.cuda.get_device_capability(device)),
        }
        command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
        values = _output(command).splitlines()[:1]
        known |= dict(
            zip(query.split(","), [v.strip() for v in ",".join(values).split(",")], strict=False)
        )
    return known


def _cores() -> int | None:
    """Those that this process may use, where the system tells."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    return _output(["git", "-C", str(ROOT), *arguments]).strip()


def _output(command: Sequence[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""


def verdict(ratio: float) -> str:
    """Win, loss or even, by the baseline's time over ours."""
    return "even" if abs(ratio - 1) <= EVEN else "win" if ratio > 1 else "loss"


def comparison_table(rows: Sequence[Row]) -> Table:
    """Ours beside each baseline that took part, losses too."""
    table = Table(title="ours against baselines (ratio: the baseline's time over ours)")
    for name in ("suite", "case", "ours ms", "p99", "ceiling %", "baseline", "its ms", "ratio", ""):
        right = name in ("ours ms", "p99", "ceiling %", "its ms", "ratio")
        table.add_column(name, justify="right" if right else "left")
    present = [row for row in rows if not row.missing]
    for mine in (row for row in present if row.body == OURS):
        ceiling = f"{mine.ceiling_percent:.0f}" if mine.ceiling_percent else ""
        first = [mine.suite, mine.case, f"{mine.p50_ms:.4g}", f"{mine.p99_ms:.4g}", ceiling]
        baselines = [
            row
            for row in present
            if (row.suite, row.case) == (mine.suite, mine.case) and row.body != OURS
        ]
        for row in baselines:
            ratio = row.p50_ms / mine.p50_ms
            table.add_row(*first, row.body, f"{row.p50_ms:.4g}", f"{ratio:.2f}", verdict(ratio))
            first = [""] * 5
        if not baselines:
            table.add_row(*first, "", "", "", "")
    return table


def left_out(rows: Sequence[Row]) -> list[str]:
    """Who took no part, and why, once each."""
    return [
        f"left out: {who}" for who in sorted({f"{r.body}: {r.missing}" for r in rows if r.missing})
    ]
