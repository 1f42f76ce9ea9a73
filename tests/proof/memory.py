"""`python -m tests.proof.memory [PYTEST ARGUMENTS]`: the kernels' memory, watched access by access.

Every launch of the kernel tests, and of the faults planted in `test_memory`, is compiled to
Triton's IR and executed on the CPU by ttsem, which stops at an access outside a tensor and at an
element that two programs touch and one of them writes. It wants Python 3.12 and an environment of
its own: `make memory`. Not seen: what lies below the IR (barriers, copies that run ahead), inline
assembly, for which its plain form stands in as under the interpreter, and races in a launch of
more than four million accesses.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from ttsem import harness, sanitize  # type: ignore[import-not-found]  # not in every environment

TESTS = ("tests/kernels", "tests/proof/test_memory.py", "-m", "interpreter")
# What compiles operations through PyTorch asks for a driver; a whole network takes an hour.
LEFT_OUT = "test_operation", "one_graph", "test_tune", "test_network", "planted_faults"


def main(arguments: Sequence[str]) -> int:
    """Run pytest; its exit code."""
    from yolov7.kernels import runtime

    runtime.INTERPRET = True  # kernels run, of tensors on a CPU, and leave inline assembly out
    _write_descriptors()
    left_out = "-k", " and ".join(f"not {name}" for name in LEFT_OUT)
    found: int = sanitize.run_pytest(["-p", __spec__.name, *TESTS, *left_out, "-q", *arguments])
    return found


def pytest_sessionstart() -> None:
    """Play a GPU as old as the interpreter's: programmatic launch is inline assembly."""
    torch.cuda.get_device_capability = lambda *_: (8, 0)


def _write_descriptors() -> None:
    """Let what a kernel stores through a descriptor arrive in its tensor, which 0.1.0 forgets."""
    write_back = sanitize._write_back

    def write(record: Any, execution: Any) -> None:
        bound = {
            name: value.base if harness._is_descriptor(value) else value
            for name, value in record.bound.items()
        }
        write_back(replace(record, bound=bound), execution)

    sanitize._write_back = write


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
