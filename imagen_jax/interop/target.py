"""Replaces an existing file or directory: all or nothing."""

import contextlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from imagen_jax import storage
from imagen_jax.errors import UserError


@contextlib.contextmanager
def replacing(
    path: str | os.PathLike, *, overwrite: bool, sources: Sequence[Path] = ()
) -> Iterator[Path]:
    """A path beside `path` to write a file or a run directory to; at the end it replaces `path`.

    What was there stays complete until then, and remains if the body raises. Raises ValueError if
    `path` exists and `overwrite` is not set, if it is a symbolic link (its target is never
    touched), a directory without a run, or one that contains any of the `sources` of the
    conversion; and at the end, if a file would replace a directory, or a directory a file.
    """
    if storage.is_remote(storage.folder(path)):
        raise UserError(f"{path}: must be a local path; copy the result to the store afterwards.")
    path = Path(path)
    if path.is_symlink():
        raise UserError(f"{path} is a symbolic link: give the path that it points to.")
    if path.exists() and not overwrite:
        raise UserError(f"{path} exists: choose another name, or replace it with --overwrite.")
    marks = ("config.json", "model_index.json")  # of a run, and of a diffusers folder
    if path.is_dir() and not any((path / name).is_file() for name in marks):
        raise UserError(f"{path} is a directory without a config.json: it is not replaced.")
    converted = [source.resolve() for source in sources]
    if any(path.resolve() in (source, *source.parents) for source in converted):
        raise UserError(f"{path} contains what is to be converted: choose another path.")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, old = (
        path.with_name(f".{path.name}.{os.getpid()}.{end}") for end in ("partial", "old")
    )
    try:
        yield partial
        if path.exists() and path.is_dir() != partial.is_dir():
            there, new = ("a directory", "a file") if path.is_dir() else ("a file", "a directory")
            raise UserError(f"{path} is {there}: {new} does not replace it.")
        if partial.is_dir() or path.is_dir():  # directories cannot be replaced in one step
            if path.exists():
                path.rename(old)
            try:
                partial.rename(path)
            except OSError:
                if old.exists():
                    old.rename(path)
                raise
        else:
            partial.replace(path)
    finally:
        _remove(partial)
        _remove(old)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
