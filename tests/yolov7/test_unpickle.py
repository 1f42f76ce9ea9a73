"""Reading pickles without executing them: files that mean harm."""

import os
import struct
import tracemalloc
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.yolov7.test_checkpoint import refused
from yolov7.unpickle import TorchFile


def torch_zip(path: Path, program: bytes, storages: dict[str, bytes] | None = None) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        for key, data in (storages or {}).items():
            file.writestr(f"archive/data/{key}", data)
    return path


def tensor_program(shape: str, stride: str, offset: str = "0", numel: str = "4") -> bytes:
    """A protocol-0 pickle of one tensor; the numbers are given as they stand in it."""

    def numbers(text: str) -> str:
        return "(" + "".join(f"I{n}\n" for n in text.split()) + "t"

    return (
        "ctorch._utils\n_rebuild_tensor_v2\n("
        "(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI" + numel + "\ntQ"
        f"I{offset}\n{numbers(shape)}{numbers(stride)}I00\nNtR."
    ).encode()


class Runs:
    """Pickles into a call of `os.system`."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> Any:
        return os.system, (self.command,)


def test_a_pickle_that_would_run_a_command_does_not(tmp_path: Path) -> None:
    mark = tmp_path / "ran"
    path = tmp_path / "evil.pt"
    torch.save({"model": Runs(f"touch {mark}")}, path)
    assert "system, which no checkpoint needs; nothing was executed" in refused(path)
    assert not mark.exists()


@pytest.mark.parametrize(
    ("module", "name"),
    [("builtins", "eval"), ("builtins", "getattr"), ("os", "system"), ("torchx", "x"),
     ("_codecs", "decode"), ("collections", "deque"), ("subprocess", "Popen")],
)  # fmt: skip
def test_other_names_are_refused_by_name(tmp_path: Path, module: str, name: str) -> None:
    path = torch_zip(tmp_path / "a.pt", f"c{module}\n{name}\n.".encode())
    assert f"{module}.{name}" in refused(path)


@pytest.mark.parametrize("name", ["torch.hub.load", "torch.serialization.load", "numpy.load"])
def test_recorded_names_are_never_called(tmp_path: Path, name: str) -> None:
    module, _, function = name.rpartition(".")
    program = f"c{module}\n{function}\n(V/nonexistent\ntR.".encode()
    with TorchFile(torch_zip(tmp_path / "a.pt", program)) as file:
        assert file.root.origin == name


@pytest.mark.parametrize(
    "program",
    [
        tensor_program(f"{2**62}", "1"),
        tensor_program(f"{2**62}", "0"),
        tensor_program("2 2", "2 2"),
        tensor_program("2", "1", offset="3"),
        tensor_program("2", "-1", offset="1"),
        tensor_program("2", "1", offset="-1"),
        tensor_program("-1", "1"),
        tensor_program("2 2", "2"),
        tensor_program("4", "1", numel=f"{2**62}"),
        tensor_program("0 0x1" + "0" * 20, "1 1"),
        tensor_program(f"{2**62} " * 200_000, "0 " * 200_000),  # a product that takes minutes
    ],
)
def test_tensors_beyond_their_storage_are_refused(tmp_path: Path, program: bytes) -> None:
    refused(torch_zip(tmp_path / "a.pt", program, {"0": bytes(16)}))


def test_a_tensor_within_its_storage_is_read(tmp_path: Path) -> None:
    data = struct.pack("<4f", 1, 2, 3, 4)
    path = torch_zip(tmp_path / "a.pt", tensor_program("2", "2", offset="1"), {"0": data})
    with TorchFile(path) as file:
        assert file.root.load().tolist() == [2, 4]


@pytest.mark.parametrize(
    "program",
    [
        b"]" * 1_000_000 + b"a" * 999_999 + b".",  # lists a million deep
        b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",  # a bytearray of a terabyte
        b"\x80\x02]r\xff\xff\xff\xff.",  # a memo of four billion entries
        b"\x80\x02\x8a\xff",  # cut in the middle of an instruction
        b"I" + b"9" * 100_000 + b"\n.",  # an endless number
        b"",
        b"(.",
        b"\x80\x02]\x85R.",  # a call of a list
        # a storage named by a list of 2 ** 40 items
        b"(Vstorage\nctorch\nFloatStorage\n" + b"](N" + b"2\x86" * 40 + b"eVcpu\nI4\ntQ.",
        b"\x80\x04\x8c\x02os\x8c\x09\n\x1b[31m\xed\xa0\x80\x93.",  # a name with control characters
    ],
    ids=[
        *("deep", "bytearray", "memo", "cut", "number", "empty", "mark", "call"),
        *("storage", "control"),
    ],
)
def test_abused_pickles_end_in_one_line(tmp_path: Path, program: bytes) -> None:
    refused(torch_zip(tmp_path / "a.pt", program))


def test_modules_nested_too_deep_are_refused(tmp_path: Path) -> None:
    level = b"ctorch.nn\nModule\n(tR(dV_modules\n(dVx\n"
    program = b"(dVmodel\n" + level * 1000 + b"N" + b"ssb" * 1000 + b"s."
    assert "nested more than 32 deep" in refused(torch_zip(tmp_path / "a.pt", program))


MODULE = b"ctorch.nn\nModule\n"
MODULES = MODULE + b"q\x00" + b"h\x00)\x81" * 1_000_000
DEEP_TUPLE = b")" + b"\x85" * 1_000_000
DEEP = "dict key of type tuple"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (b"}" + DEEP_TUPLE + b"Ns.", DEEP),
        (b"}(" + DEEP_TUPLE + b"Nu.", DEEP),
        (b"(" + DEEP_TUPLE + b"Nd.", DEEP),
        (b"ccollections\nOrderedDict\n)R" + DEEP_TUPLE + b"Ns.", DEEP),
        (b"ccollections\nOrderedDict\n(](" + DEEP_TUPLE + b"N\x86etR.", "damaged"),
        (b"ccollections\nOrderedDict\n(](" + DEEP_TUPLE + b"N\x86et\x81.", "no tensors"),
        (b"cbuiltins\nset\n(](" + DEEP_TUPLE + b"etR.", "no tensors"),
        (b"\x8f(" + DEEP_TUPLE + b"\x90.", "holds a list"),
        (b"(" + DEEP_TUPLE + b"\x91.", "holds a list"),
        (DEEP_TUPLE + b".", "holds a tuple"),
        (b"}K\x00" * 1_000_000 + b"N" + b"s" * 1_000_000 + b".", "no tensors"),
        (MODULES + b"N" + b"b" * 1_000_000 + b".", "no tensors"),
    ],
    ids=[
        *("setitem", "setitems", "dict", "ordered", "ordered-call", "ordered-new"),
        *("set", "additems", "frozenset", "tuple", "values", "states"),
    ],
)
def test_a_million_levels_end_in_one_line(tmp_path: Path, program: bytes, message: str) -> None:
    assert message in refused(torch_zip(tmp_path / "a.pt", program))


@pytest.mark.parametrize("protocol", [2, 5])
def test_plain_containers_are_read(tmp_path: Path, protocol: int) -> None:
    ordered = OrderedDict({"a": 1})
    ordered._metadata = {"version": 1}  # type: ignore[attr-defined]  # as state dicts have it
    plain = {"a": ordered, 1: {True: None}, (1, "b"): [2.0], "set": {1, (2, 3)}}
    torch.save(plain, tmp_path / "a.pt", pickle_protocol=protocol)
    with TorchFile(tmp_path / "a.pt") as file:
        del plain["set"], file.root["set"]  # nobody needs them
        assert file.root == plain


@pytest.mark.parametrize(
    "target",
    [
        tensor_program("2", "1")[:-1],
        b"(Vstorage\nctorch\nFloatStorage\nV0\nVcpu\nI4\ntQ",
        b"ctorch._utils\n_rebuild_tensor_v2\n",
        MODULE,
        b"ccollections\nOrderedDict\n",
    ],
    ids=["tensor", "storage", "function", "class", "dict-class"],
)
@pytest.mark.parametrize("state", [b"}Vnumel\nI9000015\ns", b"(N}V__doc__\nVx\nst"])
def test_attributes_of_other_objects_are_not_set(
    tmp_path: Path, target: bytes, state: bytes
) -> None:
    path = torch_zip(tmp_path / "a.pt", target + state + b"b.", {"0": bytes(16)})
    assert "sets attributes of a" in refused(path)


@pytest.mark.parametrize("compressed", [16, 1_200_000_000])
def test_a_storage_beyond_the_end_of_the_file_is_refused(tmp_path: Path, compressed: int) -> None:
    path = tmp_path / "a.pt"
    program = tensor_program("300000000", "1", numel="300000000")
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", program)
        file.writestr("archive/data/0", bytes(16))
        # The central directory, written at the end, states another size than the entry has.
        file.infolist()[-1].file_size = 1_200_000_000
        file.infolist()[-1].compress_size = compressed
    assert "truncated or not a PyTorch checkpoint" in refused(path)


def test_names_that_unfold_endlessly_are_not_printed(tmp_path: Path) -> None:
    names = b"](" + b"N" + b"2\x86" * 40 + b"e"
    program = MODULE + b")\x81}Vnames\n" + names + b"sb."
    assert "no tensors" in refused(torch_zip(tmp_path / "a.pt", program))


def test_dictionaries_that_modules_share_are_refused(tmp_path: Path) -> None:
    """3000 modules of the same 3000 tensors would have nine million names."""
    tensor = tensor_program("1", "1")[:-1] + b"q\x01"
    shared = b"}q\x02" + b"".join(b"V%d\nh\x01s" % i for i in range(3000))
    one = b"V_parameters\n" + b"h\x02s"
    child = MODULE + b")\x81}" + one + b"b"
    children = b"}" + b"".join(b"V%d\n%bs" % (i, child) for i in range(3000))
    program = tensor + b"0" + shared + b"0" + MODULE + b")\x81}V_modules\n" + children + b"sb."
    path = torch_zip(tmp_path / "a.pt", program, {"0": bytes(16)})
    tracemalloc.start()
    assert "two modules share their parameters" in refused(path)
    assert tracemalloc.get_traced_memory()[1] < 50e6
    tracemalloc.stop()


def test_a_storage_that_tensors_share_is_read_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flat = torch.arange(1000.0)
    state = {str(i): flat[i * 10 : i * 10 + 10] for i in range(100)}
    torch.save(state, tmp_path / "a.pt")
    reads: list[str] = []
    read = zipfile.ZipFile.read

    def count(self: zipfile.ZipFile, name: Any, pwd: bytes | None = None) -> bytes:
        reads.append(name.filename)
        return read(self, name, pwd)

    monkeypatch.setattr(zipfile.ZipFile, "read", count)
    with TorchFile(tmp_path / "a.pt") as file:
        loaded = {name: tensor.load() for name, tensor in file.root.items()}
    assert len(reads) == 1
    for name, tensor in state.items():
        assert torch.equal(loaded[name], tensor)
    loaded["0"].zero_()
    assert loaded["1"][0] == 10  # no memory in common


def test_endless_names_are_refused(tmp_path: Path) -> None:
    long = b"V" + b"x" * 100_000 + b"\n"
    program = MODULE + b")\x81}V_modules\n}" + long + MODULE + b")\x81ssb."
    assert "a name of 100000 characters" in refused(torch_zip(tmp_path / "a.pt", program))


def test_what_grows_with_the_classes_is_built_for_a_known_trunk_only(tmp_path: Path) -> None:
    state = OrderedDict(
        {
            "model.0.conv.weight": torch.zeros(32, 3, 3, 3),
            "model.1.m.0.bias": torch.zeros(3 * (5 + 1_000_000), dtype=torch.int8),
        }
    )
    torch.save(state, tmp_path / "a.pt")
    refused(tmp_path / "a.pt")  # imports what is not to be counted
    tracemalloc.start()
    assert "another architecture" in refused(tmp_path / "a.pt")
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
