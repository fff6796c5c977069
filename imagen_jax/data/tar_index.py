"""Where the members of tar shards are: read from their headers once, and kept for the next time.

An index is a few arrays, memory-mapped from ~/.cache/imagen-jax/index if reading the headers took
longer than `KEPT_AFTER` seconds. Shards that have not changed since are not read again, even if the
index was made for another selection of shards in the same folder.
"""

import functools
import hashlib
import json
import multiprocessing
import os
import shutil
import tarfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64, UInt32

from imagen_jax.data import files, kinds
from imagen_jax.data.records import Strings, key_hashes
from imagen_jax.errors import UserError, first_line

COLUMNS = ("picture", *kinds.BESIDE)
BLOCK = tarfile.BLOCKSIZE
VERSION = 1
KEPT_AFTER = 2.0
KEPT = 4  # indices of shards in one folder
IN_PROCESSES = 2**31  # bytes: from this size on, several processes read the shards

Members = dict[str, tuple[int, int]]  # kind -> offset and size


@dataclass(frozen=True)
class Index:
    """The records of shards in order, and where each kind of file is in the shard: at
    `offsets[kind]` (-1 for a record without one), with `sizes[kind]` bytes."""

    keys: Strings
    hashes: UInt32[np.ndarray, "n"]  # of the keys
    shards: UInt32[np.ndarray, "n"]
    offsets: Mapping[str, Int64[np.ndarray, "n"]]
    sizes: Mapping[str, UInt32[np.ndarray, "n"]]
    states: tuple[files.State, ...]  # of the shards
    left_out: Mapping[str, str]
    damage: Mapping[str, str]  # shard -> what is wrong with it


class _Part(NamedTuple):
    """The index of one shard."""

    keys: list[str]
    places: Int64[np.ndarray, "n 10"]  # offset and size of each of COLUMNS
    left_out: dict[str, str]
    damage: str | None


def read(paths: Sequence[str]) -> Index:
    """The index of shards. Raises UserError if one is compressed, or cannot be read."""
    states = tuple(files.state(path) for path in paths)
    where = _folder(paths)
    kept = where / _digest([paths, states])
    if (kept / "index.json").is_file():
        return _load(kept)
    before = _newest(where)
    known = {} if before is None else _parts(before)
    began = time.monotonic()
    todo = [p for p, state in zip(paths, states, strict=True) if (p, state) not in known]
    found = dict(zip(todo, _read_all(todo, states), strict=True))
    parts = [
        found[path] if path in found else known[path, state]()
        for path, state in zip(paths, states, strict=True)
    ]
    index = _joined(paths, states, parts)
    if time.monotonic() - began > KEPT_AFTER:
        _save(kept, paths, index)
        return _load(kept) if (kept / "index.json").is_file() else index
    return index


def _read_all(paths: Sequence[str], states: Sequence[files.State]) -> list[_Part]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if len(paths) < 2 or cores == 1 or sum(state.size for state in states) < IN_PROCESSES:
        return [_read_one(path) for path in paths]
    # Spawned: a fork would copy the locks of JAX's threads.
    start = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(cores, len(paths)), mp_context=start) as pool:
        return list(pool.map(_read_one, paths, chunksize=1))


def _read_one(path: str) -> _Part:
    shard, left_out = files.stem(path), {}
    index: dict[str, Members] = {}
    damage = None
    with files.open_binary(path) as file:
        _check_plain(path, file.read(6))
        file.seek(0)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                for member in tar:
                    _add(index, member, shard, left_out)
                    tar.members.clear()  # or it would keep them all
                file.seek(tar.offset)
            damage = _damage(file)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            damage = f"is not a complete tar: {first_line(error)}"
    if damage is not None:
        _forget_cut_off(index, files.state(path).size)
    keys, places = [], []
    for stem, members in index.items():
        if "picture" in members:
            keys.append(f"{shard}/{stem}")
            found = (members.get(kind, (-1, 0)) for kind in COLUMNS)
            places.append([value for place in found for value in place])
        elif members.keys() & set(kinds.CAPTIONS):
            left_out[f"{shard}/{stem}"] = "a caption without a picture"
    table = np.array(places, np.int64).reshape(-1, 2 * len(COLUMNS))
    return _Part(keys, table, left_out, damage)


def _add(
    index: dict[str, Members], member: tarfile.TarInfo, shard: str, left_out: dict[str, str]
) -> None:
    name = member.name.removeprefix("./")
    stem, kind = kinds.split_beside(name)
    reason = kinds.why_not(kind)
    is_part = kind in kinds.PICTURES or kind in kinds.BESIDE
    if kinds.hidden(name) or member.isdir() or not (is_part or reason):
        return
    kind = "picture" if kind in kinds.PICTURES else kind
    if is_part and (not member.isreg() or member.issparse()):
        reason = "a link or a sparse file, which is not read"
    elif is_part and kind in index.get(stem, ()):
        reason = "a second member with the same name"
    if reason:
        left_out[f"{shard}/{name}"] = reason
    else:
        index.setdefault(stem, {})[kind] = (member.offset_data, member.size)


def _forget_cut_off(index: dict[str, Members], size: int) -> None:
    """Drops records with a member that ends after the end of a shard that was cut off."""
    for stem, members in list(index.items()):
        if any(offset + length > size for offset, length in members.values()):
            del index[stem]


def _check_plain(path: str, start: bytes) -> None:
    magic = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    for mark, program in magic.items():
        if start.startswith(mark):
            raise UserError(
                f"{path} is compressed ({program}): random access to its records needs a "
                "plain .tar; decompress it"
            )


def _damage(file: Any) -> str | None:
    """What is wrong after the last member, where only zeros must follow, at least a block."""
    end = file.tell()
    block = file.read(BLOCK)
    if len(block) < BLOCK:
        return f"is not a complete tar: no end marker at byte {end}, so it was cut off"
    if block.strip(b"\0"):
        return f"is damaged: no valid member header at byte {end}"
    while block := file.read(2048 * BLOCK):
        if rest := block.lstrip(b"\0"):
            at = file.tell() - len(rest)
            return (
                f"has data at byte {at}, after its end at byte {end}: a damaged shard, or several "
                "in one file"
            )
    return None


def _joined(paths: Sequence[str], states: Sequence[files.State], parts: Sequence[_Part]) -> Index:
    places = np.concatenate([part.places for part in parts])
    present = [kind for i, kind in enumerate(COLUMNS) if (places[:, 2 * i] >= 0).any()]
    column = {kind: 2 * COLUMNS.index(kind) for kind in present}
    counts = [len(part.keys) for part in parts]
    return Index(
        keys=Strings.of(key for part in parts for key in part.keys),
        hashes=key_hashes(key for part in parts for key in part.keys),
        shards=np.repeat(np.arange(len(parts), dtype=np.uint32), counts),
        offsets={kind: places[:, column[kind]].copy() for kind in present},
        sizes={kind: places[:, column[kind] + 1].astype(np.uint32) for kind in present},
        states=tuple(states),
        left_out=functools.reduce(lambda a, b: a | b, (part.left_out for part in parts), {}),
        damage={path: part.damage for path, part in zip(paths, parts, strict=True) if part.damage},
    )


def _parts(folder: Path) -> dict[tuple[str, files.State], Any]:
    """The shards of an index on disk, each as a function that extracts its part."""
    index, paths = _load(folder), json.loads((folder / "index.json").read_text())["paths"]

    def part(number: int) -> _Part:
        rows = np.flatnonzero(index.shards == number)
        table = np.full((len(rows), 2 * len(COLUMNS)), -1, np.int64)
        for i, kind in enumerate(COLUMNS):
            if kind in index.offsets:
                table[:, 2 * i] = index.offsets[kind][rows]
                table[:, 2 * i + 1] = index.sizes[kind][rows]
        mine = files.stem(paths[number]) + "/"
        left_out = {k: why for k, why in index.left_out.items() if k.startswith(mine)}
        damage = index.damage.get(paths[number])
        return _Part([index.keys[row] for row in rows], table, left_out, damage)

    return {
        (path, state): functools.partial(part, number)
        for number, (path, state) in enumerate(zip(paths, index.states, strict=True))
    }


def _folder(paths: Sequence[str]) -> Path:
    """Where indices of shards in this folder are kept."""
    home = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    above = os.path.commonprefix([os.path.abspath(p) if "://" not in p else p for p in paths])
    return home / "imagen-jax" / "index" / _digest([above.rpartition("/")[0]])


def _newest(where: Path) -> Path | None:
    found = [path for path in where.glob("*") if (path / "index.json").is_file()]
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


def _digest(value: Any) -> str:
    text = json.dumps([VERSION, value]).encode("utf-8", "surrogateescape")
    return hashlib.blake2b(text, digest_size=12).hexdigest()


def _save(folder: Path, paths: Sequence[str], index: Index) -> None:
    """Keeps an index if the disk allows it: without it the headers are read again."""
    arrays = {"letters": index.keys.letters, "ends": index.keys.ends, "hashes": index.hashes}
    arrays["shards"] = index.shards
    arrays |= {f"offsets-{kind}": array for kind, array in index.offsets.items()}
    arrays |= {f"sizes-{kind}": array for kind, array in index.sizes.items()}
    about = {
        "paths": list(paths),
        "states": index.states,
        "kinds": list(index.offsets),
        "left_out": dict(index.left_out),
        "damage": dict(index.damage),
    }
    partial = folder.with_name(f"{folder.name}.{os.getpid()}")
    try:
        partial.mkdir(parents=True, exist_ok=True)
        for name, array in arrays.items():
            np.save(partial / f"{name}.npy", array)
        (partial / "index.json").write_text(json.dumps(about))
        partial.rename(folder)
        others = sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)
        for old in others[:-KEPT]:
            shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        print(f"note: the index of the shards could not be saved: {first_line(error)}")
        shutil.rmtree(partial, ignore_errors=True)


def _load(folder: Path) -> Index:
    about = json.loads((folder / "index.json").read_text())

    def array(name: str) -> np.ndarray:
        return np.load(folder / f"{name}.npy", mmap_mode="r")

    return Index(
        keys=Strings(array("letters"), array("ends")),
        hashes=array("hashes"),
        shards=array("shards"),
        offsets={kind: array(f"offsets-{kind}") for kind in about["kinds"]},
        sizes={kind: array(f"sizes-{kind}") for kind in about["kinds"]},
        states=tuple(files.State(*state) for state in about["states"]),
        left_out=about["left_out"],
        damage=about["damage"],
    )
