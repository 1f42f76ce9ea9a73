"""The fuzzer finds what is planted."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.proof import reader
from tests.proof.fuzz import fuzz
from tests.proof.reader import Door, Read, Reader
from yolov7.errors import UserError


def seeds() -> list[bytes]:
    return [b"sound"]


def opened(folder: Path) -> Read:
    def read(data: bytes) -> None:
        match data[:1]:
            case b"r":
                raise UserError("refused")
            case b"t":
                raise KeyError(1)
            case b"e":
                os.system("true")
            case b"w":
                (Path(__file__).parent / "nowhere" / "x").open("w")
            case b"d":
                os.kill(os.getpid(), signal.SIGSEGV)
            case b"h":
                while True:
                    pass
            case b"m":
                bytearray(200 << 20)

    return read


PLANTED = Door(seeds, opened)


@pytest.fixture(scope="module")
def child() -> Iterator[Reader]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reader, "LONGEST", 2)  # zeroing memory may take half a second
        patch.setattr(reader, "MEMORY", 100 << 20)
        made = Reader(PLANTED)
        yield made
        made.close()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        *((b"sound", "read"), (b"r", "refused"), (b"t", "traceback")),
        *((b"e", "executed"), (b"w", "written"), (b"d", "died"), (b"h", "hang"), (b"m", "memory")),
        (b"sound", "read"),
    ],
)
def test_what_is_planted_is_found(child: Reader, data: bytes, kind: str) -> None:
    assert child.read(data).kind == kind


def test_inputs_change_until_they_find_it(tmp_path: Path) -> None:
    report = fuzz(PLANTED, 60, tmp_path, seed=0, enough=1)
    assert report.faults
    (kept,) = (tmp_path / "found").iterdir()
    assert kept.name.split("-")[0] in report.kinds
