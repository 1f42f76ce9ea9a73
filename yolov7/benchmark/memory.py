"""Memory held, now and at most: of the device on CUDA, else of the process."""

import gc
import os
import sys
from pathlib import Path

import torch

try:
    import resource
except ImportError:  # Windows
    resource = None  # type: ignore[assignment]  # so that its absence can be asked for

HELD = Path("/proc/self/statm")  # in pages; Linux only


def forget_peak() -> None:
    """Let the peak be that of what comes; a process has one peak only."""
    if torch.cuda.is_available():
        gc.collect()  # a plan is part of a cycle: that of an engine before may still be there
        torch.cuda.init()  # there is no peak to forget before
        for index in range(torch.cuda.device_count()):
            torch.cuda.reset_peak_memory_stats(index)


def peak_bytes(device: torch.device) -> int | None:
    """Most memory held since `forget_peak`, or by the process; None where no one tells."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if resource is None:
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max(peak, held_bytes(device) or 0)  # Linux counts some pages late in the former


def held_bytes(device: torch.device) -> int | None:
    """Memory held now; None where no one tells."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    if not HELD.exists():
        return None
    return int(HELD.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
