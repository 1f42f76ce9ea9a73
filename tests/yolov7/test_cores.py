"""How many cores are ours, with the files of containers planted."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from yolov7 import cores
from yolov7.cores import cpu_quota, usable_cores

V1 = "4:memory:/docker/1\n2:cpu,cpuacct:/docker/1\n1:cpuset:/\n0::/\n"
GROUP = "sys/fs/cgroup/cpu/docker/1"


@pytest.mark.parametrize(
    ("groups", "files", "expected"),
    [
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "150000 100000\n"}, 2),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "5000 100000\n"}, 1),
        ("0::/\n", {"sys/fs/cgroup/cpu.max": "max 100000\n"}, None),
        ("0::/\n", {}, None),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "300000 100000\n",
                       "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, 3),
        ("0::/a/b\n", {"sys/fs/cgroup/a/cpu.max": "100000 100000\n",
                       "sys/fs/cgroup/a/b/cpu.max": "800000 100000\n"}, 1),
        (V1, {f"{GROUP}/cpu.cfs_quota_us": "400000\n",
              f"{GROUP}/cpu.cfs_period_us": "100000\n"}, 4),
        (V1, {f"{GROUP}/cpu.cfs_quota_us": "-1\n", f"{GROUP}/cpu.cfs_period_us": "100000\n"}, None),
        # within the container its own group is the root
        (V1, {"sys/fs/cgroup/cpu/cpu.cfs_quota_us": "100000\n",
              "sys/fs/cgroup/cpu/cpu.cfs_period_us": "50000\n"}, 2),
        (None, {}, None),
    ],
)  # fmt: skip
def test_the_quota_of_a_container_is_read(
    tmp_path: Path, groups: str | None, files: dict[str, str], expected: int | None
) -> None:
    if groups is not None:
        files = {"proc/self/cgroup": groups, **files}
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == expected


def test_a_quota_counts_as_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    for quota, expected in ((None, 16), (3, 3), (64, 16)):
        monkeypatch.setattr(cores, "cpu_quota", lambda quota=quota: quota)
        assert usable_cores() == expected


@pytest.mark.parametrize(("stated", "expected"), [(None, "1"), ("2", "2")])
def test_a_network_on_a_cpu_keeps_to_the_quota(stated: str | None, expected: str) -> None:
    code = """
import torch
torch.set_num_threads(2)
from yolov7 import cores
cores.cpu_quota = lambda: 1
from yolov7.engine.cpu import keep_to_quota
keep_to_quota()
print(torch.get_num_threads())
"""
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment |= {"OMP_NUM_THREADS": stated} if stated else {}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment
    )
    assert done.stdout.strip() == expected
