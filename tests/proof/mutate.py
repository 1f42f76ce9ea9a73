"""Changes that turn a sound input into a hostile one: of its bytes, its text, or its tree."""

import json
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

LARGEST = 1 << 19  # bytes of an input

NUMBERS = (
    0,
    1,
    2,
    7,
    8,
    255,
    256,
    32767,
    65535,
    1 << 20,
    2**31 - 1,
    2**31,
    2**32 - 1,
    2**63,
    2**64,
)
TEXTS = (
    *("", " ", "0", "-1", "1e999", "nan", "inf", "\0", "..", "/", "~", "null", "true", "a" * 300),
    *("\x1b[2Jx", "\r\a", "\ud800", "\udcff", "\u202e", "[/red]", r"$\frac{$", "日本語", "%s{0}"),
)
VALUES: tuple[Any, ...] = (
    *(None, True, [], {}, [[]], {"": None}, 0.5, -1, 1e308, -1e-320, float("nan"), float("inf")),
    *(10**400, "9" * 5000, ["x"] * 3000, *NUMBERS, *TEXTS),
)
TOKENS = (
    *(b"&a ", b"*a", b"*a, *a", b"<<: *a", b"!!timestamp ", b"!!python/object:os.system ", b"? "),
    *(b"2001-99-99", b"- ", b": ", b"\n", b"\r", b"\t", b"---\n", b"%YAML 9\n", b"{", b"[" * 5000),
    *(b'{"a":' * 3000, b"\xff\xfe", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\xff", b"0x", b"1_0"),
    *(text.encode(errors="surrogatepass") for text in TEXTS),
)


def mutate(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Some changes of an input, at most `LARGEST` long.

    Args:
        random: What decides.
        data: Is changed.
        others: Inputs of the same door, from which parts are taken.
    """
    for _ in range(random.choice((1, 1, 1, 2, 4, 8))):
        change = random.choice(CHANGES)
        data = change(random, data, others)[:LARGEST]
    return data


def _place(random: Random, data: bytes) -> tuple[int, int]:
    """Where a part of the data begins and ends, mostly a short one."""
    start = random.randint(0, len(data))
    longest = random.choice((1, 4, 16, 256, len(data)))
    return start, min(len(data), start + random.randint(0, longest))


def _put(data: bytes, start: int, end: int, part: bytes) -> bytes:
    return data[:start] + part + data[end:]


def _flip(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    at = random.randrange(len(data) or 1)
    return _put(
        data, at, at + 1, bytes([random.choice((0, 1, 127, 128, 255, random.randrange(256)))])
    )


def _number(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    """A number of 1 to 8 bytes over what is there."""
    size, at = random.choice((1, 2, 4, 8)), random.randrange(len(data) or 1)
    value = random.choice(NUMBERS) + random.randint(-2, 2)
    order = random.choice(("big", "little"))
    return _put(
        data,
        at,
        at + size,
        (value % 256**size).to_bytes(size, "little")[:: 1 - 2 * (order == "big")],
    )


def _remove(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _place(random, data)
    return _put(data, start, end, b"")


def _cut(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    return data[: random.randint(0, len(data))]


def _repeat(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _place(random, data)
    return _put(data, end, end, data[start:end] * random.choice((1, 1, 2, 10, 1000)))


def _splice(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = random.choice(others)
    (start, end), (first, last) = _place(random, data), _place(random, other)
    return _put(data, start, end, other[first:last])


def _token(random: Random, data: bytes, _: Sequence[bytes]) -> bytes:
    start, end = _place(random, data)
    return _put(data, start, random.choice((start, end)), random.choice(TOKENS))


def _tree(random: Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Another value somewhere in a JSON; what is none is spliced."""
    try:
        tree = json.loads(data)
    except (ValueError, RecursionError):
        return _splice(random, data, others)
    try:
        return json.dumps(_other_value(random, tree)).encode()
    except (ValueError, RecursionError):  # numbers of 5000 digits have no text
        return data


def _other_value(random: Random, tree: Any) -> Any:
    if not tree or random.random() < 0.1 or not isinstance(tree, dict | list | str):
        return random.choice(VALUES)
    if isinstance(tree, str):
        return _other_text(random, tree)
    tree = tree.copy()
    key = random.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
    if random.random() < 0.1:
        del tree[key]
    elif isinstance(tree, dict) and random.random() < 0.1:
        tree[random.choice(TEXTS)] = tree.pop(key)
    elif isinstance(tree, list) and random.random() < 0.1:
        tree *= random.choice((2, 100))
    else:
        tree[key] = _other_value(random, tree[key])
    return tree


def _other_text(random: Random, text: str) -> Any:
    """A text may be JSON itself, as values of metadata are."""
    try:
        return json.dumps(_other_value(random, json.loads(text)))
    except (ValueError, RecursionError):
        at = random.randint(0, len(text))
        return random.choice((text[:at] + random.choice(TEXTS) + text[at:], random.choice(VALUES)))


Change = Callable[[Random, bytes, Sequence[bytes]], bytes]
CHANGES: tuple[Change, ...] = (
    *(_flip, _number, _remove, _cut, _repeat, _splice, _token),
    *(_tree,) * 7,
)
