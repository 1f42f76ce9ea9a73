"""Read a `torch.save` file without executing it.

A pickle is a program. Here its instructions only ever build plain containers and inert records:
every class or function that it names becomes a `Record` of that name, tensors become
`StoredTensor`s whose size, stride and offset are checked against their storage before a view of
it is made. Names outside a short list are refused, and so is whatever would have the interpreter
hash or print the nested objects of a file: it does so level by level, on the C stack.
"""

import math
import pickle
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from yolov7.errors import UserError
from yolov7.text import one_line

# Names that are recorded, never imported: what the authors' training scripts store.
_RECORDED = ("models.", "utils.", "torch.", "numpy.", "pathlib.", "argparse.")
_RECORDED_EXACTLY = ("_codecs.encode", "builtins.set", "__builtin__.set")
_STORAGES = {
    "torch.FloatStorage": torch.float32,
    "torch.DoubleStorage": torch.float64,
    "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16,
    "torch.LongStorage": torch.int64,
    "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16,
    "torch.CharStorage": torch.int8,
    "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool,
}

_DEEPEST = 32  # modules within modules; the family needs 4
_LONGEST = 100  # characters of a module's or tensor's name within its module
_DIMENSIONS = 8  # of a tensor; the family needs 6


class Record:
    """An object of the pickle: the name of its class or function, and its state."""

    origin = ""  # dotted name, set by the subclass that stands for it

    state: Any = None

    def __init__(self, *args: Any) -> None:
        """Take the arguments; nobody reads them."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """A pickled dict subclass sets items; nobody reads them."""

    def append(self, value: Any) -> None:
        """A pickled list subclass appends; nobody reads it."""

    def get(self, name: str, default: Any = None) -> Any:
        """The attribute `name` of the object that this stands for."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


class _Table(dict[Any, Any]):
    """A dict or OrderedDict of the pickle: its items come one by one, under plain keys."""

    def __init__(self) -> None:
        """Without items."""

    def __setitem__(self, key: Any, value: Any) -> None:
        for part in key if isinstance(key, tuple) else (key,):
            if not isinstance(part, str | int | float | None):
                raise pickle.UnpicklingError(
                    f"a dict key of type {type(key).__name__} with a {type(part).__name__} in it"
                )
        super().__setitem__(key, value)


@dataclass(frozen=True)
class _Storage:
    archive: "_Archive"
    key: str
    dtype: torch.dtype
    numel: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in the file, checked but not yet read."""

    storage: _Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> Tensor:
        """The tensor itself, on the CPU; it shares no memory with others."""
        s = self.storage
        if not s.numel:
            return torch.empty(self.shape, dtype=s.dtype)
        whole = math.prod(self.shape) == s.numel
        data = torch.frombuffer(s.archive.read(f"data/{s.key}", keep=not whole), dtype=s.dtype)
        return data.as_strided(self.shape, self.stride, self.offset).clone()


def _rebuild_tensor(
    storage: _Storage, offset: int, shape: tuple[int, ...], stride: tuple[int, ...], *_: Any
) -> StoredTensor:
    numbers = (offset, *shape, *stride)
    if (
        not isinstance(storage, _Storage)
        or not len(shape) == len(stride) <= _DIMENSIONS
        or not all(isinstance(n, int) and 0 <= n < 2**63 for n in numbers)
    ):
        raise pickle.UnpicklingError("a tensor with an impossible shape")
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    elements = math.prod(shape)
    if elements > storage.numel or (elements and last >= storage.numel):
        raise pickle.UnpicklingError(
            f"a tensor of shape {list(shape)} that its {storage.numel} stored elements cannot hold"
        )
    return StoredTensor(storage, offset, tuple(shape), tuple(stride))


def _rebuild_parameter(data: Any, *_: Any) -> Any:
    return data


_BUILDERS: dict[str, Callable[..., Any]] = {
    "collections.OrderedDict": _Table,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
}


class _Archive:
    """The zip file that `torch.save` writes: NAME/data.pkl beside NAME/data/KEY."""

    def __init__(self, file: zipfile.ZipFile, length: int) -> None:
        self.file = file
        self.entries = {}
        self._kept: dict[str, bytearray] = {}
        for info in file.infolist():
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise zipfile.BadZipFile("compressed entries")
            if info.header_offset + info.file_size > length:
                raise zipfile.BadZipFile("entries beyond its end")
            self.entries[info.filename.partition("/")[2]] = info

    def read(self, name: str, *, keep: bool) -> bytearray:
        """An entry, whose CRC is checked; kept if others are going to read it, too."""
        if name in self._kept:
            return self._kept[name]
        data = bytearray(self.file.read(self.entries[name]))
        if keep:
            self._kept[name] = data
        return data


class _InertUnpickler(pickle._Unpickler):  # the C one fills memory for a hostile memo index
    # What the base class has and its stub lacks.
    stack: list[Any]
    pop_mark: Callable[[], list[Any]]

    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)
    del dispatch[pickle.BYTEARRAY8[0]]  # allocates whatever size it is told
    # Nobody reads a set: it becomes a list, whose items are not hashed.
    dispatch[pickle.EMPTY_SET[0]] = dispatch[pickle.EMPTY_LIST[0]]
    dispatch[pickle.ADDITEMS[0]] = dispatch[pickle.APPENDS[0]]
    dispatch[pickle.FROZENSET[0]] = dispatch[pickle.LIST[0]]

    def load_empty_dictionary(self) -> None:
        self.stack.append(_Table())

    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dictionary

    def load_dict(self) -> None:
        items, table = self.pop_mark(), _Table()
        for key, value in zip(items[::2], items[1::2], strict=True):
            table[key] = value
        self.stack.append(table)

    dispatch[pickle.DICT[0]] = load_dict

    def load_build(self) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, _Table):  # whose attributes, `_metadata`, nobody reads
            raise pickle.UnpicklingError(f"it sets attributes of a {type(target).__name__}")

    dispatch[pickle.BUILD[0]] = load_build

    def __init__(self, archive: _Archive) -> None:
        super().__init__(archive.file.open(archive.entries["data.pkl"]))
        self.archive = archive
        self.classes: dict[str, type[Record]] = {}

    def find_class(self, module: str, name: str) -> Any:
        origin = f"{module}.{name}"
        if origin in _BUILDERS:
            return _BUILDERS[origin]
        if not (origin.startswith(_RECORDED) or origin in _RECORDED_EXACTLY):
            raise pickle.UnpicklingError(f"it names {origin}, which no checkpoint needs")
        if origin not in self.classes:
            self.classes[origin] = type("Record", (Record,), {"origin": origin})
        return self.classes[origin]

    def persistent_load(self, pid: Any) -> _Storage:
        kind, storage_type, key, _, numel = pid
        if not isinstance(key, str):
            raise pickle.UnpicklingError(f"a storage named by a {type(key).__name__}")
        dtype = _STORAGES.get(getattr(storage_type, "origin", ""))
        entry = self.archive.entries.get(f"data/{key}")
        if kind != "storage" or dtype is None or entry is None or not isinstance(numel, int):
            raise pickle.UnpicklingError(f"an unknown storage {key!r}")
        if not 0 <= numel * dtype.itemsize <= entry.file_size:
            raise pickle.UnpicklingError(
                f"a storage of {numel} elements in {entry.file_size} bytes"
            )
        return _Storage(self.archive, key, dtype, numel)


class TorchFile:
    """An opened `torch.save` file: `root` is what was saved, inert.

    Raises:
        UserError: the file is damaged, is no such file, or names what no checkpoint needs.
    """

    def __init__(self, path: Path) -> None:
        try:
            self._zip = zipfile.ZipFile(path)
            archive = _Archive(self._zip, path.stat().st_size)
            self.root: Any = _InertUnpickler(archive).load()
        except pickle.UnpicklingError as error:
            raise UserError(f"{path}: refused, {one_line(error)}; nothing was executed") from None
        except zipfile.BadZipFile as error:
            raise UserError(f"{path}: truncated or not a PyTorch checkpoint ({error})") from None
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from None
        except Exception as error:  # a hostile pickle can make any of them
            what = one_line(f"{type(error).__name__}: {error}")
            raise UserError(f"{path}: damaged or not a PyTorch checkpoint ({what})") from None

    def __enter__(self) -> "TorchFile":
        return self

    def __exit__(self, *_: object) -> None:
        self._zip.close()


def module_tensors(root: Record) -> tuple[dict[str, StoredTensor], list[Record]]:
    """Tensors of a pickled module by state-dict name, and its modules, in registration order.

    A module that occurs more than once is listed where it comes first.

    Raises:
        UserError: the names would grow beyond what the file holds: modules nested too deep, names
            too long, a dictionary that several modules share.
    """
    tensors: dict[str, StoredTensor] = {}
    modules: list[Record] = []
    seen: set[int] = set()
    stack = [("", root)]
    while stack:
        prefix, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        if prefix.count(".") > _DEEPEST:
            raise UserError(f"refused: modules nested more than {_DEEPEST} deep")
        modules.append(module)
        for group in ("_parameters", "_buffers", "_modules"):
            members = module.get(group)
            if members:
                if id(members) in seen:
                    raise UserError(f"refused: two modules share their {group[1:]}")
                seen.add(id(members))
        for group in ("_parameters", "_buffers"):
            for name, value in _items(module.get(group)):
                if isinstance(value, StoredTensor):
                    tensors[prefix + name] = value
        children = [(f"{prefix}{n}.", m) for n, m in _items(module.get("_modules"))]
        stack += [(n, m) for n, m in reversed(children) if isinstance(m, Record)]
    return tensors, modules


def _items(value: Any) -> Iterator[tuple[str, Any]]:
    for name, item in value.items() if isinstance(value, dict) else ():
        if isinstance(name, str):
            if len(name) > _LONGEST:  # it would be part of every name below it
                raise UserError(f"refused: a name of {len(name)} characters")
            yield name, item
