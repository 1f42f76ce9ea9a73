"""Signs of life on the terminal, and nothing where standard error is no terminal."""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import TypeVar

from yolov7.text import printable

T = TypeVar("T")


def progress(items: Iterable[T], title: str, total: int) -> Iterator[T]:
    """Pass the items on, showing how far of `total` they are; the bar goes away at the end."""
    from rich.console import Console  # 30 ms, for those who look at a terminal
    from rich.progress import track

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from items
        return
    yield from track(items, _plain(title), total, console=console, transient=True)


def working(title: str) -> AbstractContextManager[object]:
    """Show that something goes on whose length is not known, while the context lasts."""
    from rich.console import Console

    console = Console(stderr=True)
    return console.status(_plain(title)) if console.is_terminal else nullcontext()


def _plain(title: str) -> str:
    """A title without commands to the terminal, nor to rich, which reads brackets as markup."""
    from rich.markup import escape

    return escape(printable(title))
