"""Open a source of captioned pictures by its name, as `--data` gives it.

    bundled                   the emoji that come with the package
    scenes[:PART]             coloured shapes, drawn as they are read (scenes.py)
    FOLDER                    pictures with a .txt of the same stem beside them, or .tar shards
    FILE.tar, 'DIR/*.tar', 'DIR/{00000..00009}.tar'    img2dataset or webdataset shards
    tfds:NAME[:SPLIT]         a tensorflow-datasets set prepared as array_record

What is held out never depends on the order or the number of records: for the bundled set it is in
its metadata, elsewhere a hash of each record's key decides.
"""

import glob
import itertools
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np

from imagen_jax.data import kinds, readers, scenes, shards
from imagen_jax.data.records import Source, Split
from imagen_jax.data.written import shown
from imagen_jax.errors import UserError

# Things the demo's captions name, in colours its captions name; none is a caption of the set.
NEW_COMBINATIONS = (
    "blue apple",
    "red book",
    "blue star",
    "green umbrella",
    "red moon",
    "blue balloon",
    "green fish",
    "red butterfly",
)


def open_source(
    spec: str | os.PathLike,
    *,
    split: Split | None = None,
    limit: int | None = None,
    heldout_fraction: float = 1 / 50,
    data_dir: str | os.PathLike | None = None,
) -> Source:
    """The source `spec` names; its `split`, and the first `limit` records of that, where given.

    `data_dir` is where `tfds:` sets are prepared (default: tensorflow-datasets' own). ValueError,
    in one line, for a source that does not exist, holds no picture or is damaged.
    """
    source = _open(str(spec), heldout_fraction, data_dir)
    if split is not None:
        source = source.split(split)
    return source if limit is None else source.take(limit)


def demo_captions() -> list[str]:
    """64 captions of the bundled training set whose pictures are easy to tell apart."""
    text = resources.files("imagen_jax.data").joinpath("bundled/demo_captions.txt").read_text()
    return text.splitlines()


def _open(spec: str, heldout_fraction: float, data_dir: str | os.PathLike | None) -> Source:
    if spec == "bundled":
        return _bundled()
    if spec == "scenes" or spec.startswith("scenes:"):
        return scenes.open_scenes(spec.partition(":")[2] or None)
    if spec.startswith("tfds:"):
        match = re.fullmatch(r"tfds:(.+?(?::\d+\.\d+\.\d+)?)(?::([^:]+))?", spec)
        if match is None:
            raise UserError(f"{spec!r} does not name a set: write tfds:NAME or tfds:NAME:SPLIT")
        name, part = match.groups()
        return readers.prepared(name, part, data_dir=data_dir, heldout_fraction=heldout_fraction)
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path, heldout_fraction)
    paths = [path] if path.is_file() else _matching(spec)
    if not paths:
        raise UserError(
            f"no source {spec!r}: give 'bundled', 'scenes', a folder, a .tar shard or a glob of "
            "them, or tfds:NAME[:SPLIT]"
        )
    for path in paths:
        if kinds.split_name(path.name)[1] in kinds.ARCHIVES:
            raise UserError(f"{path} is not a plain .tar: unpack it to one, or to a folder")
        if not _is_shard(path.name) or not path.is_file():
            raise UserError(f"{path} is neither a folder nor a .tar shard")
    return shards.tar_shards(paths, heldout_fraction=heldout_fraction)


def _open_folder(path: Path, heldout_fraction: float) -> Source:
    """The shards below a folder, or the pictures. Raises UserError where it holds both."""
    left_out: dict[str, str] = {}
    names = readers.files_below(path, left_out)
    tars = [name for name in names if _is_shard(name)]
    if not tars:
        return readers.folder(path, names, left_out, heldout_fraction=heldout_fraction)
    pictures = [name for name in names if kinds.split_name(name)[1] in kinds.PICTURES]
    if pictures:
        raise UserError(
            f"{path} holds pictures ({len(pictures)}: {shown(pictures[0])}) and shards "
            f"({len(tars)}: {shown(tars[0])}): give the shards as a pattern, or move one of them"
        )
    source = shards.tar_shards([path / name for name in tars], heldout_fraction=heldout_fraction)
    archives = {name: kinds.why_not(kinds.split_name(name)[1]) for name in names}
    archives = {name: reason for name, reason in archives.items() if reason}
    return replace(source, left_out={**source.left_out, **left_out, **archives})


def _is_shard(name: str) -> bool:
    return kinds.split_name(name)[1] == "tar"


def _matching(pattern: str) -> list[Path]:
    """The files of a glob with the shell's braces, {00000..00009} and {a,b}; sorted.

    Raises UserError for a name without wildcards, out of braces, that does not exist.
    """
    found: list[str] = []
    names = list(_expanded(pattern))
    for name in names:
        matches = glob.glob(name, recursive=True)
        if not matches and len(names) > 1 and not glob.has_magic(name):
            raise UserError(f"{pattern!r}: there is no {name}")
        found += matches
    return sorted({Path(name) for name in found})


def _expanded(pattern: str) -> Iterator[str]:
    """`a{1,2}` and `a{08..10}` as a shell writes them out, the zeros in front kept."""
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


def _bundled() -> Source:
    """The shard in the package; its metadata says which captions are held out."""
    shard = Path(str(resources.files("imagen_jax.data").joinpath("bundled/00000.tar")))
    source = shards.tar_shards([shard], heldout_fraction=0.0)
    split = [source.read.metadata(i)["split"] for i in range(len(source))]
    return replace(source, name="bundled", heldout=np.array(split) == "heldout")
