"""What the architectures differ in, for the cost model, the search space and compiler limits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What a program may count on, and what a typical GPU of the kind is like.

    Clock, processors, products and memory are those of its data sheet; what no sheet says, or what
    differs between cards of a kind, is an interval.
    """

    shared_bytes: int
    """Shared memory that one program may use."""
    processors: int
    """Streaming multiprocessors."""
    clock: float
    """Hz under load."""
    products: int
    """Multiply-adds of 16-bit numbers, summed in fp32, that a processor makes in a cycle."""
    l2: tuple[float, float]
    """Bytes per second from the L2 cache."""
    memory: tuple[float, float]
    """Bytes per second from memory."""


ARCHITECTURES = {
    (0, 0): Architecture(65_536, 304, 2.1e9, 1024, (5e12, 10e12), (4e12, 5.3e12)),  # AMD's MI300X
    (8, 0): Architecture(166_912, 108, 1.41e9, 1024, (3.5e12, 5.5e12), (1.3e12, 1.9e12)),  # A100
    # A10, RTX 30xx
    (8, 6): Architecture(101_376, 84, 1.7e9, 256, (1.5e12, 3e12), (0.5e12, 0.9e12)),
    (8, 7): Architecture(166_912, 16, 1.3e9, 1024, (0.3e12, 0.6e12), (0.15e12, 0.2e12)),  # Orin
    # L4, L40, RTX 40xx
    (8, 9): Architecture(101_376, 128, 2.5e9, 256, (3e12, 5.5e12), (0.3e12, 1e12)),
    # H100, H200
    (9, 0): Architecture(232_448, 132, 1.7e9, 2048, (5.5e12, 9.5e12), (2.8e12, 4.3e12)),
    (10, 0): Architecture(232_448, 148, 1.8e9, 4096, (7e12, 14e12), (6e12, 7.5e12)),  # B200
    (10, 3): Architecture(232_448, 160, 1.8e9, 4096, (7e12, 14e12), (6e12, 7.5e12)),  # B300
    (11, 0): Architecture(232_448, 20, 1.5e9, 4096, (0.7e12, 1.5e12), (0.2e12, 0.27e12)),  # Thor
    # RTX 50xx, RTX PRO 6000
    (12, 0): Architecture(101_376, 170, 2.4e9, 256, (4e12, 8e12), (1.3e12, 1.8e12)),
    (12, 1): Architecture(101_376, 48, 2.4e9, 256, (1e12, 2e12), (0.2e12, 0.27e12)),  # DGX Spark
}
"""By compute capability; what is not here is `UNKNOWN`."""
UNKNOWN = Architecture(101_376, 108, 1.5e9, 512, (2e12, 5e12), (0.5e12, 1.5e12))
