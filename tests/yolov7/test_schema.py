"""JSON of strangers as dataclasses."""

import json
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.yolov7.exports import METADATA
from yolov7.schema import from_json
from yolov7.suppression import Suppression
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


def altered(value: Any, key: list[int], new: Any) -> Any:
    """A JSON value with a part of it replaced: a key a level says which."""
    if not key or not isinstance(value, dict | list) or not value:
        return new
    if isinstance(value, list):
        place = key[0] % len(value)
        return [altered(v, key[1:], new) if i == place else v for i, v in enumerate(value)]
    name = sorted(value)[key[0] % len(value)]
    return {**value, name: altered(value[name], key[1:], new)}


LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
ANYTHING = st.recursive(
    LEAVES, lambda c: st.lists(c, max_size=3) | st.dictionaries(st.text(max_size=5), c, max_size=3)
)
DETECTIONS = replace(METADATA, layout="detections", nms=Suppression())


@pytest.mark.parametrize("known", [VARIANTS["yolov7-w6"], DETECTIONS], ids=["variant", "metadata"])
@given(key=st.lists(st.integers(0, 30), max_size=4), new=ANYTHING)
def test_anything_is_read_or_refused(known: Any, key: list[int], new: Any) -> None:
    value = altered(json.loads(json.dumps(asdict(known))), key, new)
    made, problem = None, ""
    try:
        made = from_json(type(known), value)
    except ValueError as error:
        problem = str(error)
    assert problem.isprintable()
    assert len(problem) < 300
    if made is not None:  # it is what would have been written
        assert from_json(type(known), json.loads(json.dumps(asdict(made)))) == made


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
