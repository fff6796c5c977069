"""Files of run directories, on a disk or in an object store (`gs://`, `s3://`), via etils.epath.

An object store has no rename, no lock, no append and no empty directories; a file appears there
complete or not at all. A disk has all four, and may lose power in the middle of a write.
"""

import contextlib
import json
import os
import re
from collections.abc import Iterator
from typing import Any

import fsspec
from etils import epath

from imagen_jax.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


STORES = ("gs://", "s3://", "az://")  # those that epath supports

# How TensorStore's messages about a failing disk or store start.
_PASSING = re.compile(
    r"\b(UNKNOWN|CANCELLED|DEADLINE_EXCEEDED|PERMISSION_DENIED|RESOURCE_EXHAUSTED|ABORTED|"
    r"UNAVAILABLE|UNAUTHENTICATED): "
)


def folder(path: str | os.PathLike) -> epath.Path:
    """The path, local or remote. A `pathlib.Path` of `gs://bucket/run` has lost a slash, which is
    restored."""
    text = os.fspath(path)
    if found := re.match(r"(gs|s3|az):/+", text):
        return epath.Path(f"{found[1]}://{text[found.end() :]}")
    return epath.Path(text)


def check_clients(path: epath.Path) -> None:
    """Raises UserError if a client for Google's object store is not installed: gcsfs, or the one
    with which Orbax deletes old steps."""
    if not os.fspath(path).startswith("gs://"):
        return
    try:
        fsspec.get_filesystem_class("gs")
        from google.cloud import storage as _  # noqa: F401
    except ImportError as error:
        raise UserError(f"{path}: {error}. It needs: pip install -e '.[gcs]'") from error


def check_writable(path: epath.Path) -> None:
    """Raises UserError for a local folder, which need not exist yet, that cannot be written to."""
    if is_remote(path):
        return
    nearest = next(one for one in (path, *path.parents) if one.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest} is a file, so no folder can be created there.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{nearest}: no permission to write there.")


def is_remote(path: str | os.PathLike) -> bool:
    """Whether the path is in an object store."""
    return "://" in os.fspath(path)


def write_text(path: epath.Path, text: str) -> None:
    """`write_bytes` in UTF-8."""
    write_bytes(path, text.encode())


def write_bytes(path: epath.Path, content: bytes) -> None:
    """Writes a file so that readers see the old one or the new one, never a partial one."""
    if is_remote(path):
        path.write_bytes(content)
        return
    partial = path.with_name(path.name + ".partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())  # or a power cut may leave an empty file under the new name
    partial.replace(path)


def is_passing(error: Exception) -> bool:
    """Whether a read error is due to the disk or the store, and not to what is stored: another
    attempt may succeed. TensorStore raises ValueError for these too."""
    if isinstance(error, OSError):
        return not isinstance(error, (FileNotFoundError, IsADirectoryError, NotADirectoryError))
    return bool(_PASSING.search(str(error)))


@contextlib.contextmanager
def alone(path: epath.Path) -> Iterator[None]:
    """Allows one process at a time in this directory, if the file system has locks."""
    if fcntl is None or is_remote(path):
        yield
        return
    with (path / ".lock").open("a") as file:
        with contextlib.suppress(OSError):  # a network file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def move(path: epath.Path, target: epath.Path) -> None:
    """Renames a directory, replacing `target`; in an object store, copies it file by file."""
    target.rmtree(missing_ok=True)
    if not is_remote(path):
        path.rename(target)
        return
    for file in files(path):
        file.copy(target / os.path.relpath(file, path))
    path.rmtree()


def files(path: epath.Path) -> Iterator[epath.Path]:
    """All files below a directory."""
    for entry in path.iterdir():
        if entry.is_dir():
            yield from files(entry)
        else:
            yield entry


def read_object(path: epath.Path) -> dict[str, Any]:
    """The object in a JSON file. Raises UserError that names the file if it holds none."""
    try:
        data = json.loads(path.read_text())
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are both
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} must contain a JSON object, not {type(data).__name__}.")
    return data
