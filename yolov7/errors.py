"""The one exception that the command line turns into a one-line message."""


class UserError(ValueError):
    """Something that the user can mend: the message says what is wrong and what to do."""
