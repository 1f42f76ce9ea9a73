"""A plain fused forward in a process of its own, with the allocator as glibc sets it.

`Network` keeps freed memory, for its whole process: beside it a plain forward would take no page
faults either. `python -m bench.baselines.plain VARIANT SIZE` builds the model of `model`, and runs
once for every line that it reads.
"""

import subprocess
import sys
from typing import IO

import torch
from torch import Tensor

from yolov7.model import YOLOv7, create_model


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


class PlainProcess:
    """The other process; call it for a forward, `close` it at the end."""

    def __init__(self, variant: str, size: int) -> None:
        command = [sys.executable, "-m", "bench.baselines.plain", variant, str(size)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __call__(self) -> Tensor:
        """Boxes [10, 5] of one forward."""
        print(file=_open(self._process.stdin), flush=True)
        values = [float(word) for word in _open(self._process.stdout).readline().split()]
        return torch.tensor(values).view(-1, 5)

    def close(self) -> None:
        """End it."""
        _open(self._process.stdin).close()
        self._process.wait()


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None  # both are pipes
    return stream


@torch.inference_mode()
def _serve(variant: str, size: int) -> None:
    network, x = model(variant).fuse(), image(size)
    for _ in range(3):
        network(x)
    for _ in sys.stdin:
        print(*sampled(network(x)).flatten().tolist(), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
