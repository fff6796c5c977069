"""Files of data sets, on a disk or wherever fsspec reaches: `gs://`, `s3://`, `https://`."""

import glob
import itertools
import os
import posixpath
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import fsspec

from imagen_jax.errors import UserError, first_line
from imagen_jax.storage import is_remote


class State(NamedTuple):
    """What distinguishes a file from a later one of the same name."""

    size: int
    changed: str


def open_binary(path: str) -> Any:
    """A binary file for random access. Raises UserError for a remote one that cannot be reached."""
    if not is_remote(path):
        return open(path, "rb")
    system, name = remote(path)
    try:
        return system.open(name, "rb", block_size=2**16)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error


def read_bytes(path: str) -> bytes:
    with open_binary(path) as file:
        return file.read()


def state(path: str) -> State:
    """Raises UserError for a file that is not there."""
    try:
        if is_remote(path):
            system, name = remote(path)
            info = system.info(name)
            marks = ("etag", "ETag", "mtime", "LastModified", "created")
            return State(int(info["size"] or 0), str([info[m] for m in marks if m in info]))
        found = os.stat(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    return State(found.st_size, str(found.st_mtime_ns))


def remote(path: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of an address, and its path there. Raises UserError if the package for it is
    missing."""
    try:
        return fsspec.core.url_to_fs(path)
    except (ImportError, ValueError) as error:
        raise UserError(f"{path}: {first_line(error)}") from error


def stem(path: str) -> str:
    """`a/b/00001.tar` is `00001`."""
    return posixpath.splitext(posixpath.basename(path.replace(os.sep, "/")))[0]


def matching(pattern: str) -> list[str]:
    """The files that match a glob with the shell's braces, {00000..00009} and {a,b}; sorted.

    Raises UserError if braces expand to a name without wildcards that does not exist.
    """
    found: list[str] = []
    names = list(_expanded(pattern))
    for name in names:
        matches = _glob(name)
        if not matches and len(names) > 1 and not glob.has_magic(name):
            raise UserError(f"{pattern!r}: there is no {name}")
        found += matches
    return sorted(set(found))


def _glob(name: str) -> list[str]:
    if not is_remote(name):
        return glob.glob(name, recursive=True)
    if name.startswith("http"):  # HTTP has no listings
        return [name]
    system, inside = remote(name)
    try:
        return [system.unstrip_protocol(one) for one in system.glob(inside)]
    except OSError as error:
        raise UserError(f"{name} cannot be read: {first_line(error)}") from error


def _expanded(pattern: str) -> Iterator[str]:
    """`a{1,2}` and `a{08..10}` as a shell expands them, with leading zeros kept."""
    parts = re.split(r"\{([^{}]*,[^{}]*|\d+\.\.\d+)\}", pattern)
    choices = []
    for number, part in enumerate(parts):
        first, dots, last = part.partition("..")
        if number % 2 == 0:
            choices.append([part])
        elif dots and "," not in part:
            width = len(first)
            choices.append([f"{i:0{width}d}" for i in range(int(first), int(last) + 1)])
        else:
            choices.append(part.split(","))
    return ("".join(chosen) for chosen in itertools.product(*choices))
