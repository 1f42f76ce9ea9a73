"""The one exception that the command line turns into a one-line message, and how to get there."""

from yolov7.text import printable


class UserError(ValueError):
    """Something that the user can mend: the message says what is wrong and what to do.

    Args:
        message: One line. What of it comes from outside may hold anything: it is made printable.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))


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
