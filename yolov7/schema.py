"""Dataclasses made of JSON that anyone may have written: every value is checked by its type."""

import math
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")

LARGEST = 2**31 - 1  # of a whole number
LONGEST = 4096  # characters of a text


def from_json(kind: type[T], value: object) -> T:
    """The value as an instance of a dataclass.

    Args:
        kind: A dataclass whose fields are of type bool, int, float, str, Literal, None, dataclass,
            and unions, lists, tuples and dicts by str of these.
        value: What `json.loads` makes of `dataclasses.asdict` of such an instance.

    Raises:
        ValueError: Something is missing, superfluous, or of another type; the message names it.
    """
    made: T = _read(kind, value, "")
    return made


def _read(kind: Any, value: Any, where: str) -> Any:
    origin, parts = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _read_fields(kind, value, where)
    if origin in (Union, UnionType):
        return _read_union(parts, value, where)
    if origin in (list, tuple):
        if not isinstance(value, list | tuple):
            raise ValueError(f"{where} is no list")
        variable = origin is list or parts[-1] is Ellipsis
        if not variable and len(value) != len(parts):
            raise ValueError(f"{where} has {len(value)} values instead of {len(parts)}")
        kinds: Iterable[Any] = [parts[0]] * len(value) if variable else parts
        rows = zip(kinds, value, strict=True)
        return origin(_read(k, v, f"{where}[{i}]") for i, (k, v) in enumerate(rows))
    if origin is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {_shown(value)}, not a table")
        return {str(k): _read(parts[1], v, f"{where}.{_shown(k)}") for k, v in value.items()}
    if origin is Literal:
        if value not in parts:
            raise ValueError(f"{where} is {_shown(value)}, not {', '.join(map(str, parts))}")
        return value
    if kind is float and _is_number(value):
        return float(value)
    sound = {
        bool: isinstance(value, bool),
        int: isinstance(value, int) and _is_number(value),
        str: isinstance(value, str) and len(value) <= LONGEST,
        type(None): value is None,
    }
    if not sound.get(kind, False):
        what = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
        raise ValueError(f"{where} is {_shown(value)}, not {what.get(kind, 'null')}")
    return value


def _read_fields(kind: Any, value: Any, where: str) -> Any:
    if not isinstance(value, dict):
        raise ValueError(f"{where or 'it'} is {_shown(value)}, not a table")
    prefix = f"{where}." if where else ""
    known = {field.name: field for field in fields(kind)}
    for name in value.keys() - known.keys():
        raise ValueError(f"{prefix}{_shown(name)} is not known")
    for name, field in known.items():
        if name not in value and field.default is field.default_factory is MISSING:
            raise ValueError(f"{prefix}{name} is missing")
    kinds = get_type_hints(kind)
    return kind(**{name: _read(kinds[name], v, prefix + name) for name, v in value.items()})


def _read_union(kinds: tuple[Any, ...], value: Any, where: str) -> Any:
    """The first that fits; None's complaint would be the least help of all."""
    problem = ValueError(f"{where} is {_shown(value)}")
    for kind in kinds:
        if kind is type(None) and value is None:
            return None
        if kind is not type(None):
            try:
                return _read(kind, value, where)
            except ValueError as error:
                problem = error
    raise problem


def _is_number(value: object) -> bool:
    """Whether it is a number that arithmetic can do with: true, NaN and 10^4000 are not."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= LARGEST if isinstance(value, int) else math.isfinite(value)


def _shown(value: object) -> str:
    """A value on one short line; what could be deep or long is only named."""
    match value:
        case dict():
            return "a table"
        case list() | tuple():
            return "a list"
        case str():
            return ascii(value[:40])
        case int() if abs(value) > LARGEST:
            return "too large"
    return str(value)
