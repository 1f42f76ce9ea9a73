"""JSON of strangers as dataclasses."""

import json
from dataclasses import asdict, dataclass
from typing import Literal

import pytest

from yolov7.schema import from_json
from yolov7.variants import VARIANTS, Variant, scaled


@dataclass(frozen=True)
class Inner:
    number: int
    share: float | None = None


@dataclass(frozen=True)
class Outer:
    name: str
    on: bool
    kind: Literal["a", "b"]
    size: int | Literal["dynamic"]
    pair: tuple[int, int]
    rows: tuple[Inner, ...]
    words: list[str]
    ranges: dict[str, float]
    inner: Inner | None = None


VALUE = Outer("x", True, "b", "dynamic", (1, 2), (Inner(3, 0.5), Inner(4)), ["w"], {"r": 1.5})


def test_what_was_written_is_read() -> None:
    assert from_json(Outer, json.loads(json.dumps(asdict(VALUE)))) == VALUE


@pytest.mark.parametrize("name", VARIANTS)
def test_every_architecture_is_read(name: str) -> None:
    spec = scaled(VARIANTS[name], 1.5, 1.25, "downc", 0.3)
    assert from_json(Variant, json.loads(json.dumps(asdict(spec)))) == spec


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("name", 3, "name is 3, not a text"),
        ("name", "x" * 5000, "name is 'xxxxx"),
        ("on", 1, "on is 1, not true or false"),
        ("kind", "c", "kind is 'c', not a, b"),
        ("kind", {}, "kind is a table, not a, b"),
        ("size", True, "size is True, not dynamic"),
        ("size", float("nan"), "size is nan, not dynamic"),
        ("pair", [1], r"pair has 1 values instead of 2"),
        ("pair", "12", "pair is no list"),
        ("rows", [{}], r"rows\[0\]\.number is missing"),
        ("rows", [{"number": 10**5000}], r"rows\[0\]\.number is too large"),
        ("rows", [{"number": 1, "no": 1}], r"rows\[0\]\.'no' is not known"),
        ("ranges", {"r": None}, r"ranges\.'r' is None, not a number"),
        ("inner", 7, "inner is 7, not a table"),
    ],
)
def test_what_does_not_fit_is_named(key: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_json(Outer, {**asdict(VALUE), key: value})
