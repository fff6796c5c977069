"""Tar shards of img2dataset or webdataset, as a `Source`.

The headers of a shard are read once, for where each member is; records are then read at random. A
tar has no table of contents: one that was cut off, or whose headers are damaged, reads as a shorter
one. The sign is its end, which is a block of zeros with nothing but zeros after it.
"""

import io
import os
import tarfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from imagen_jax.data import kinds
from imagen_jax.data.readers import NOT_ALL_EMBEDDED, load_embedding, make_source
from imagen_jax.data.records import Record, Source
from imagen_jax.data.written import json_object
from imagen_jax.errors import UserError, first_line

COLUMNS = ("picture", *kinds.BESIDE)
NAMED = 3  # damaged shards that a message names
BLOCK = tarfile.BLOCKSIZE

_Members = dict[str, tuple[int, int]]  # kind -> offset and size


def tar_shards(paths: Sequence[Path], *, heldout_fraction: float) -> Source:
    """The pictures of tar shards: the members of one stem are one record, in the shard's order.

    Keys are SHARD/STEM with the shard's own stem: other shards beside it change none. A `.npy`
    beside *every* picture is a stored text embedding. Raises UserError for two shards of one name,
    for compressed or damaged shards, and without a picture.
    """
    _check_names(paths)
    keys: list[str] = []
    places: list[list[int]] = []
    left_out: dict[str, str] = {}
    damage: list[str] = []
    for number, path in enumerate(paths):
        try:
            index = _index(path, left_out)
        except UserError as error:
            damage.append(str(error))
            continue
        for stem, members in index.items():
            if "picture" in members:
                keys.append(f"{path.stem}/{stem}")
                found = (members.get(kind, (-1, 0)) for kind in COLUMNS)
                places.append([number, *(value for place in found for value in place)])
            elif members.keys() & set(kinds.CAPTIONS):
                left_out[f"{path.stem}/{stem}"] = "a caption without a picture"
    if damage:
        more = f"; and {len(damage) - NAMED} more shards" if len(damage) > NAMED else ""
        raise UserError("; ".join(damage[:NAMED]) + more)
    name = f"{len(paths)} shards in {os.path.commonpath([path.parent for path in paths])}"
    if len(paths) == 1:
        name = str(paths[0])
    if not keys:
        others = "".join(f"; {n} of them {why}" for why, n in Counter(left_out.values()).items())
        raise UserError(f"no pictures ({', '.join(kinds.PICTURES)}) in {name}{others}")
    table = np.array(places, dtype=np.int64)
    embedded = table[:, 1 + 2 * COLUMNS.index("npy")] >= 0
    if not embedded.all():
        left_out |= {f"{keys[i]}.npy": NOT_ALL_EMBEDDED for i in np.flatnonzero(embedded)}
    read = _TarReader(tuple(map(str, paths)), tuple(keys), table, bool(embedded.all()))
    return make_source(
        name, keys, read, heldout_fraction, has_embeds=read.has_embeds, left_out=left_out
    )


def _check_names(paths: Sequence[Path]) -> None:
    first: dict[str, Path] = {}
    for path in paths:
        other = first.setdefault(path.stem, path)
        if other is not path:
            raise UserError(
                f"two shards of one name, {other} and {path}: a picture is known by its shard's "
                "name and its own, so rename one of them"
            )


def _index(path: Path, left_out: dict[str, str]) -> dict[str, _Members]:
    """stem -> where its members are. Members that do not belong to a record go to `left_out`.

    Raises UserError naming a shard that is compressed, or does not end as a tar does.
    """
    index: dict[str, _Members] = {}
    with open(path, "rb") as file:
        _check_plain(path, file.read(6))
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as shard:
                for member in shard:
                    _add(index, member, path.stem, left_out)
                end = shard.offset
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise UserError(f"{path} is not a complete tar: {first_line(error)}") from error
        file.seek(end)
        _check_end(path, file)
    return index


def _add(
    index: dict[str, _Members], member: tarfile.TarInfo, shard: str, left_out: dict[str, str]
) -> None:
    name = member.name.removeprefix("./")
    stem, kind = kinds.split_name(name)
    reason = kinds.why_not(kind)
    is_part = kind in kinds.PICTURES or kind in kinds.BESIDE
    if kinds.hidden(name) or member.isdir() or not (is_part or reason):
        return
    kind = "picture" if kind in kinds.PICTURES else kind
    if is_part and (not member.isreg() or member.issparse()):
        reason = "a link or a sparse file, which is not read"
    elif is_part and kind in index.get(stem, ()):
        reason = "a second one of a name that the shard has"
    if reason:
        left_out[f"{shard}/{name}"] = reason
    else:
        index.setdefault(stem, {})[kind] = (member.offset_data, member.size)


def _check_plain(path: Path, start: bytes) -> None:
    magic = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    for mark, program in magic.items():
        if start.startswith(mark):
            raise UserError(
                f"{path} is compressed ({program}): records are read at random, which needs a "
                "plain .tar; decompress it"
            )


def _check_end(path: Path, file: io.BufferedReader) -> None:
    """From where the last member ends: zeros to the end of the file, a block of them at least."""
    end = file.tell()
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        raise UserError(
            f"{path} is not a complete tar: no end marker at byte {end}, so it was cut off"
        )
    if block.strip(b"\0"):
        raise UserError(f"{path} is damaged: no header of a member at byte {end}")
    while block := file.read(2048 * BLOCK):
        if rest := block.lstrip(b"\0"):
            at = file.tell() - len(rest)
            raise UserError(
                f"{path} has data at byte {at}, after its end at byte {end}: a damaged shard, or "
                "several in one file"
            )


@dataclass(frozen=True)
class _TarReader:
    paths: tuple[str, ...]
    keys: tuple[str, ...]
    places: Int[np.ndarray, "n 11"]  # shard, then offset (-1: none) and size of each of COLUMNS
    has_embeds: bool

    def __call__(self, i: int) -> Record:
        path, members = self._members(i)
        with open(path, "rb") as file:

            def read(place: tuple[int, int]) -> bytes:
                file.seek(place[0])
                return file.read(place[1])

            embeds = load_embedding(read(members["npy"])) if self.has_embeds else None
            caption = kinds.read_caption(members, read)
            return Record(self.keys[i], read(members["picture"]), caption, embeds)

    def _members(self, i: int) -> tuple[str, _Members]:
        shard, *places = self.places[i].tolist()
        pairs = zip(COLUMNS, zip(places[::2], places[1::2], strict=True), strict=True)
        return self.paths[shard], {kind: place for kind, place in pairs if place[0] >= 0}

    def metadata(self, i: int) -> dict[str, Any]:
        """The `.json` of record i; {} without one."""
        path, members = self._members(i)
        if "json" not in members:
            return {}
        offset, size = members["json"]
        with open(path, "rb") as file:
            file.seek(offset)
            return json_object(file.read(size))
