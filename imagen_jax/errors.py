"""The one exception class for a user's mistake."""


class UserError(ValueError):
    """A wrong argument, configuration, file or flag; its message is one line that says which.

    Commands print the message without a traceback. Any other exception is a fault of this library
    or of one below it, and keeps its traceback.
    """


def first_line(error: BaseException) -> str:
    """What an exception says in one line: the first of its message, or its class."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
