"""The one exception class for a user's mistake, what a message quotes of another error, and how the
library's commands are parsed and run."""

import logging
import sys
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A wrong argument, configuration, file or flag; its message is one line that says which.

    Commands print the message without a traceback. Any other exception is a fault of this library
    or of one below it, and keeps its traceback.
    """


def run(main: Callable[[], None]) -> None:
    """Runs a command of the library: a mistake or a failing disk ends it with one line.

    Orbax warns, once for each tree that it reads, that a file is missing which it does not need.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def parse(kind: type[T], **told: Any) -> T:
    """The command line as `kind`, by `tyro.cli`, which is told the rest.

    What `kind` refuses in its `__post_init__` is raised as it is. Within tyro it would be shown in
    a frame, under the name of the class.
    """
    import tyro

    unchecked = type(kind.__name__, (kind,), {"__post_init__": lambda self: None})
    unchecked.__doc__ = kind.__doc__
    return kind(**vars(tyro.cli(unchecked, config=(tyro.conf.DisallowNone,), **told)))


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class where it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[0].split())
