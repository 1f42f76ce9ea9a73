"""Plain contenders in a process of their own, with the allocator as glibc sets it.

`Network` and the training loop keep freed memory, for their whole process: beside them plain
PyTorch would take no page faults either. A module that is run as `python -m MODULE ARGUMENTS`
hands `serve` what it does; `OwnProcess` starts it and has it take turns.
`python -m bench.baselines.plain VARIANT SIZE` is a fused forward in NCHW and fp32.
"""

import subprocess
import sys
from collections.abc import Callable
from typing import IO

import torch
from torch import Tensor

from yolov7.model import YOLOv7, create_model

WARM = 3  # runs before the first turn


def model(variant: str) -> YOLOv7:
    """The same random weights in every process."""
    torch.manual_seed(0)
    return create_model(variant).eval()


def image(size: int) -> Tensor:
    """The same random image [1, 3, size, size] in every process."""
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))


def sampled(decoded: Tensor) -> Tensor:
    """A few boxes [10, 5], to compare by."""
    return decoded[0, :: max(decoded.shape[1] // 10, 1), :5][:10]


class OwnProcess:
    """The other process; call it for a turn, `close` it at the end.

    Args:
        module: What to run.
        arguments: Of its command line.
    """

    def __init__(self, module: str, *arguments: object) -> None:
        command = [sys.executable, "-m", module, *map(str, arguments)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self) -> Tensor:
        """The numbers [n] that the turn gave."""
        print(file=_open(self._process.stdin), flush=True)
        return torch.tensor(
            [float(word) for word in _open(self._process.stdout).readline().split()]
        )

    def close(self) -> None:
        """End it."""
        _open(self._process.stdin).close()
        self._process.wait()


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None  # both are pipes
    return stream


def serve(run: Callable[[], Tensor]) -> None:
    """Run once for every line of standard input, and print the numbers that come out."""
    for _ in range(WARM):
        run()
    for _ in sys.stdin:
        print(*run().flatten().tolist(), flush=True)


@torch.inference_mode()
def _forward(variant: str, size: int) -> None:
    network, x = model(variant).fuse(), image(size)
    serve(lambda: sampled(network(x)))


if __name__ == "__main__":
    _forward(sys.argv[1], int(sys.argv[2]))
