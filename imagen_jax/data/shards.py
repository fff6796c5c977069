"""Tar shards of img2dataset or webdataset, as a `Source`.

The headers of a shard are read once, to locate its members (tar_index.py); records are then read at
random. A tar has no table of contents: one that was cut off, or whose headers are damaged, reads as
a shorter one. Only its end tells: a valid tar ends with a block of zeros and nothing but zeros
after it.
"""

import io
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from imagen_jax.data import files, kinds, tar_index
from imagen_jax.data.readers import NOT_ALL_EMBEDDED, load_embedding, make_source
from imagen_jax.data.records import Record, Source, required
from imagen_jax.data.tar_index import Index
from imagen_jax.data.written import json_object
from imagen_jax.errors import UserError
from imagen_jax.storage import is_remote

NAMED = 3  # damaged shards that a message names
MOST_DAMAGED = 1 / 20  # of all shards: more are refused

_Place = tuple[int, int]  # offset and size


def tar_shards(
    paths: Sequence[str], *, heldout_fraction: float, caption_key: str | None = None
) -> Source:
    """The pictures in tar shards: members with the same stem are one record, in the shard's order.

    Keys are SHARD/STEM, where SHARD is the shard's own stem: adding shards changes no key. A `.npy`
    beside *every* picture is a stored text embedding. A damaged shard is used up to the damage, and
    listed in the source's `left_out`. Raises UserError if more than one shard in twenty is damaged,
    if two have the same name, if one is compressed, or if there is no picture.
    """
    _check_names(paths)
    index = tar_index.read(paths)
    left_out = dict(index.left_out)
    if len(index.damage) > MOST_DAMAGED * len(paths):
        more = len(index.damage) - NAMED
        reasons = [f"{path} {why}" for path, why in list(index.damage.items())[:NAMED]]
        raise UserError("; ".join(reasons) + (f"; and {more} more shards" if more > 0 else ""))
    for path, why in index.damage.items():
        left_out[path] = f"a damaged shard, of which only the start is used: it {why}"
    name = paths[0]
    if len(paths) > 1:
        folders = {path.replace(os.sep, "/").rpartition("/")[0] for path in paths}
        name = f"{len(paths)} shards in {os.path.commonprefix(sorted(folders)) or '.'}"
    if not len(index.keys):
        others = "".join(f"; {n} of them {why}" for why, n in Counter(left_out.values()).items())
        raise UserError(f"no pictures ({', '.join(kinds.PICTURES)}) in {name}{others}")
    embedded = index.offsets["npy"] >= 0 if "npy" in index.offsets else np.zeros(1, bool)
    if not embedded.all():
        left_out |= {f"{index.keys[i]}.npy": NOT_ALL_EMBEDDED for i in np.flatnonzero(embedded)}
    read = _TarReader(tuple(paths), index, bool(embedded.all()), caption_key)
    return make_source(
        name,
        index.keys,
        read,
        heldout_fraction,
        hashes=index.hashes,
        has_embeds=read.has_embeds,
        left_out=left_out,
    )


def _check_names(paths: Sequence[str]) -> None:
    first: dict[str, str] = {}
    for path in paths:
        other = first.setdefault(files.stem(path), path)
        if other is not path:
            raise UserError(
                f"two shards have the same name, {other} and {path}: pictures are identified by "
                "their shard's name and their own, so rename one of the shards"
            )


@dataclass(frozen=True)
class _TarReader:
    paths: tuple[str, ...]
    index: Index
    has_embeds: bool
    caption_key: str | None

    def __call__(self, i: int) -> Record:
        members = self._members(i)
        with _Shard(*self._shard(i)) as read:
            embeds = load_embedding(read(members["npy"])) if self.has_embeds else None
            captions = self._captions(members, read)
            return Record.of(self.index.keys[i], read(members["picture"]), captions, embeds)

    def captions(self, i: int) -> tuple[str, ...]:
        with _Shard(*self._shard(i)) as read:
            return required(self._captions(self._members(i), read))

    def columns(self, i: int) -> Mapping[str, Any]:
        """The `.json` of record i; {} without one."""
        members = self._members(i)
        if "json" not in members:
            return {}
        with _Shard(*self._shard(i)) as read:
            return json_object(read(members["json"]))

    def _captions(
        self, members: Mapping[str, _Place], read: Callable[[_Place], bytes]
    ) -> tuple[str, ...]:
        return kinds.read_captions(members, read, key=self.caption_key)

    def _shard(self, i: int) -> tuple[str, files.State]:
        number = self.index.shards[i]
        return self.paths[number], self.index.states[number]

    def _members(self, i: int) -> dict[str, _Place]:
        return {
            kind: (int(offsets[i]), int(self.index.sizes[kind][i]))
            for kind, offsets in self.index.offsets.items()
            if offsets[i] >= 0
        }


class _Shard:
    """A context to read parts of a shard. Raises UserError for one that is gone or has changed: its
    members may then not be where they were indexed."""

    def __init__(self, path: str, state: files.State):
        self.path, self.state = path, state

    def __enter__(self) -> Callable[[_Place], bytes]:
        if is_remote(self.path):
            file = files.open_binary(self.path)
            self._close = file.close
            return partial(_seek, file)
        try:
            number = os.open(self.path, os.O_RDONLY)
        except (FileNotFoundError, PermissionError) as error:
            raise UserError(f"its shard cannot be read: {error.strerror}") from error
        self._close = partial(os.close, number)
        found = os.fstat(number)
        if (found.st_size, str(found.st_mtime_ns)) != self.state:
            self._close()
            raise UserError("its shard has changed since it was opened")
        return partial(_read_at, number)

    def __exit__(self, *_) -> None:
        self._close()


def _seek(file: io.IOBase, place: _Place) -> bytes:
    file.seek(place[0])
    return file.read(place[1])


def _read_at(number: int, place: _Place) -> bytes:
    return os.pread(number, place[1], place[0])
