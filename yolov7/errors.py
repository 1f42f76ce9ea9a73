"""The one exception that the command line turns into a one-line message."""

from yolov7.text import printable


class UserError(ValueError):
    """Something that the user can mend: the message says what is wrong and what to do.

    Args:
        message: One line. What of it comes from outside may hold anything: it is made printable.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message))
