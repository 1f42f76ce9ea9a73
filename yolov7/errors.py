"""The one exception that the command line turns into a one-line message, and how to get there."""

from yolov7.text import printable

_LONGEST = 900  # characters of a message
_END = 200  # of these at its end, where it says what to do


class UserError(ValueError):
    """Something that the user can mend: the message says what is wrong and what to do.

    Args:
        message: One line. What of it comes from outside may hold anything: it is made printable,
            and what is long is cut out of its middle.
    """

    def __init__(self, message: str) -> None:
        line = printable(message)
        if len(line) > _LONGEST:
            line = f"{line[: _LONGEST - _END]} ... {line[-_END:]}"
        super().__init__(line)


def first_line(error: BaseException) -> str:
    """An error of somebody else's in one line: its kind, and the first line of what it says."""
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def at_least_one(name: str, value: int) -> None:
    """Check a number of things.

    Raises:
        UserError: It is none.
    """
    if not isinstance(value, int) or value < 1:
        raise UserError(f"{name} is {value}: give a whole number, 1 or more")
