"""What the architectures differ in, for default configs, search space and compiler limits."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Architecture:
    """What a program may count on, and how wide a typical GPU of the kind is."""

    shared_bytes: int
    """Shared memory that one program may use."""
    processors: int
    """Streaming multiprocessors."""


ARCHITECTURES = {
    (8, 0): Architecture(166_912, 108),  # A100
    (8, 6): Architecture(101_376, 84),  # A10, RTX 30xx
    (8, 7): Architecture(166_912, 16),  # Orin
    (8, 9): Architecture(101_376, 128),  # L4, L40, RTX 40xx
    (9, 0): Architecture(232_448, 132),  # H100, H200
    (10, 0): Architecture(232_448, 148),  # B200
    (10, 3): Architecture(232_448, 160),  # B300
    (11, 0): Architecture(232_448, 20),  # Thor
    (12, 0): Architecture(101_376, 170),  # RTX 50xx, RTX PRO 6000
    (12, 1): Architecture(101_376, 48),  # DGX Spark
}
"""By compute capability; what is not here is `UNKNOWN`."""
UNKNOWN = Architecture(101_376, 108)
