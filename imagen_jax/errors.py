"""The one exception class for a user's mistake, the part of another error that a message quotes,
and how the library's commands are parsed and run."""

import dataclasses
import functools
import inspect
import logging
import sys
import typing
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A wrong argument, configuration, file or flag; its message is one line that says which.

    Commands print the message without a traceback. Any other exception is a bug in this library or
    in one that it uses, and keeps its traceback.
    """


def run(main: Callable[[], None]) -> None:
    """Runs a command of the library: a user's mistake or a failing disk ends it with one line.

    Silences warnings of absl: for each tree that it reads, Orbax warns that a file is missing which
    it does not need.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)
    try:
        main()
    except (UserError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted")


def parse(kind: type[T], **given: Any) -> T:
    """Parses the command line as `kind` with `tyro.cli`, which gets the other arguments."""
    import tyro

    form = flags(kind, own_first=True)
    return kind(**vars(tyro.cli(form, config=(tyro.conf.DisallowNone,), **given)))


def flags(kind: type, defaults: Any = None, own_first: bool = False) -> type:
    """A dataclass for tyro with the fields of the dataclass `kind` but without its checks: tyro
    would show their errors in a frame, under the name of the class.

    In --help each field is explained by its docstring, filled to the width of the terminal, and an
    empty default is not shown. Required fields come first, then with `own_first` those that a class
    does not inherit. `defaults` is an object of `kind` that has other defaults.
    """
    import tyro

    explained = _explained(kind)
    types, made = typing.get_type_hints(kind, include_extras=True), []
    for field in dataclasses.fields(kind):
        value = field.default if defaults is None else getattr(defaults, field.name)
        shown = tyro.conf.arg(help=explained[field.name], help_behavior_hint=_shown)
        typed = Annotated[types[field.name], shown]
        made.append((field.name, typed, dataclasses.field(default=value)))
    if own_first:
        made.sort(key=lambda x: list(explained).index(x[0]))
    made.sort(key=lambda x: x[2].default is not dataclasses.MISSING)
    form = dataclasses.make_dataclass(kind.__name__, made, kw_only=True)
    form.__doc__ = kind.__doc__
    return form


@functools.cache  # it parses the source of a file for each class
def _explained(kind: type) -> dict[str, str]:
    """The docstrings of a dataclass's fields, each on one line, those it does not inherit first."""
    import docstring_parser

    found: dict[str, str] = {}
    for owner in filter(dataclasses.is_dataclass, kind.__mro__):
        said = {p.arg_name: p.description for p in docstring_parser.parse_from_object(owner).params}
        for name in inspect.get_annotations(owner):
            found.setdefault(name, " ".join((said.get(name) or "").split()))
    return found


def _shown(default: str) -> str:
    return "" if default in ("", "''", "None", "False") else f"(default: {default})"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or the name of its class if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return " ".join(lines[0].split())
