"""Open a source of captioned pictures by its name, as `--data` gives it.

    bundled                   the emoji that come with the package
    FOLDER                    pictures with a .txt of the same stem beside them, or .tar shards
    FILE.tar, 'DIR/*.tar'     img2dataset or webdataset shards
    tfds:NAME[:SPLIT]         a tensorflow-datasets set prepared as array_record

What is held out never depends on the order or the number of records: for the bundled set it is in
its metadata, elsewhere a hash of each record's key decides.
"""

import glob
import os
import re
from dataclasses import replace
from importlib import resources
from pathlib import Path

import numpy as np

from imagen_jax.data import readers
from imagen_jax.data.records import Source, Split
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
    if spec.startswith("tfds:"):
        match = re.fullmatch(r"tfds:(.+?(?::\d+\.\d+\.\d+)?)(?::([^:]+))?", spec)
        if match is None:
            raise UserError(f"{spec!r} does not name a set: write tfds:NAME or tfds:NAME:SPLIT")
        name, part = match.groups()
        return readers.prepared(name, part, data_dir=data_dir, heldout_fraction=heldout_fraction)
    path = Path(spec)
    if path.is_dir():
        return _open_folder(path, heldout_fraction)
    shards = [path] if path.is_file() else sorted(map(Path, glob.glob(spec, recursive=True)))
    if shards and all(shard.suffix == ".tar" and shard.is_file() for shard in shards):
        return readers.tar_shards(shards, heldout_fraction=heldout_fraction)
    raise UserError(
        f"no source {spec!r}: give 'bundled', a folder, a .tar shard or a glob of them, "
        "or tfds:NAME[:SPLIT]"
    )


def _open_folder(path: Path, heldout_fraction: float) -> Source:
    """A folder of shards if it holds any directly, else a folder of pictures."""
    if shards := sorted(path.glob("*.tar")):
        return readers.tar_shards(shards, heldout_fraction=heldout_fraction)
    return readers.folder(path, heldout_fraction=heldout_fraction)


def _bundled() -> Source:
    """The shard in the package; its metadata says which captions are held out."""
    shard = Path(str(resources.files("imagen_jax.data").joinpath("bundled/00000.tar")))
    source = readers.tar_shards([shard], heldout_fraction=0.0)
    split = [source.read.metadata(i)["split"] for i in range(len(source))]
    return replace(source, name="bundled", heldout=np.array(split) == "heldout")
