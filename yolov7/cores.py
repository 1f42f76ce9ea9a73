"""How many processor cores are ours.

The CPU quota of a container takes no core away: whatever runs beyond it is stopped until the next
tenth of a second begins, and the threads that are not wait for those that are.
"""

import math
import os
from pathlib import Path, PurePosixPath


def usable_cores() -> int:
    """Cores that this process may run on, no more than its container's CPU quota; at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)  # Linux has it
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, cpu_quota() or cores)


def cpu_quota(root: Path = Path("/")) -> int | None:
    """The CPU quota in cores, rounded up: the least of the control group and those above it.

    Args:
        root: Of the file system.

    Returns:
        At least 1; None without a quota.
    """
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:  # another system
        return None
    cores = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        # Version 1 has a tree for each controller, version 2 one for all.
        tree = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        files = ("cpu.cfs_quota_us", "cpu.cfs_period_us") if controllers else ("cpu.max",)
        group = PurePosixPath(path.lstrip("/"))
        for above in (group, *group.parents):
            try:
                text = " ".join((tree / above / name).read_text() for name in files)
                quota, period = map(int, text.split())
            except (OSError, ValueError):  # not there, or "max"
                continue
            if quota > 0 and period > 0:  # -1: none
                cores.append(math.ceil(quota / period))
    return max(1, min(cores)) if cores else None
