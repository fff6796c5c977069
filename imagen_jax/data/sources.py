"""Open a source of captioned pictures by its name, as `--data` gives it.

    bundled                   the emoji that come with the package
    scenes[:PART]             coloured shapes, drawn as they are read (scene_source.py)
    FOLDER                    pictures with a .txt of the same stem beside them, or with one
                              metadata.jsonl or metadata.csv; or .tar shards
    FILE.tar, 'DIR/*.tar', 'DIR/{00000..00009}.tar'    img2dataset or webdataset shards
    FILE.csv, .tsv, .jsonl or .parquet    a table of paths and captions (tables.py)
    FILE.array_record         files of tf.train.Example, or a pattern of them
    tfds:NAME[:SPLIT]         a tensorflow-datasets set prepared as array_record
    hf:NAME[:SPLIT]           a dataset of the Hugging Face library, or a folder of one
    A=0.7 B=0.3               a mixture of any of these, with weights

Folders, shards and tables may be remote: gs://, s3://, https://. What is held out never depends on
the order or the number of records: for the bundled set it is in its metadata, elsewhere a hash of
each record's key decides, or the set has a split for it.
"""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import numpy as np

from imagen_jax.data import (
    array_records,
    choosing,
    files,
    hugging_face,
    kinds,
    readers,
    scene_source,
    shards,
    tables,
)
from imagen_jax.data.records import Source, Split
from imagen_jax.data.written import shown
from imagen_jax.errors import UserError
from imagen_jax.storage import STORES, is_remote

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


@dataclass(frozen=True, kw_only=True)
class Opening:
    """Which pictures, and how they are read: flags of every command that reads data."""

    data: tuple[str, ...] = ("bundled",)
    """`bundled`, `scenes` (coloured shapes, an endless supply), a folder of pictures with .txt
    captions or a metadata.jsonl, .tar shards (a quoted pattern or a folder of them), a .csv, .jsonl
    or .parquet, array_record files, tfds:NAME[:SPLIT], hf:NAME[:SPLIT]. Several, each with a
    weight: A=0.7 B=0.3."""
    heldout_fraction: float = 0.02
    """Share of the pictures kept for evaluation (sets that have a split for it use that)."""
    caption_key: str | None = None
    """Where captions are: a column, feature, or name in the .json. Default: caption, text, ..."""
    image_key: str | None = None
    """The column or feature of images. Default: image, file_name, path, ..."""
    template: str | None = None
    """Makes captions from columns or class labels: "a photo of a {label}". In a folder the label is
    the folder's name."""
    where: tuple[str, ...] = ()
    """Reads only records that meet these conditions: "width >= 256" "aesthetic > 5". Any column can
    be used, and width, height and caption_length, which are measured if no column has them."""

    def open(self, split: Split | None = None) -> Source:
        """See `open_source`."""
        return open_source(
            self.data,
            split=split,
            heldout_fraction=self.heldout_fraction,
            caption_key=self.caption_key,
            image_key=self.image_key,
            template=self.template,
            where=self.where,
        )

    @property
    def folders(self) -> list[str]:
        """The folders of the files that `data` names, local or in an object store that epath
        reaches; sets of other libraries have none."""
        found: dict[str, None] = {}
        for name, _ in map(_weighted, self.data):
            if is_remote(name) and not name.startswith(STORES):
                continue
            paths = [name] if is_remote(name) or Path(name).exists() else files.matching(name)
            for path in paths:
                is_file = Path(path).is_file() or path.endswith(".tar")
                found[os.path.dirname(path) if is_file else path] = None
        return list(found)


def gathered(arguments: Sequence[str]) -> list[str]:
    """A command line's `--data A ... --data=B` as `--data A B`: of several, tyro would take only
    the last."""
    rest: list[str] = []
    data: list[str] = []
    taking = False
    for word in arguments:
        if word.startswith("--"):
            taking = word == "--data"
        if word.startswith("--data="):
            data.append(word.removeprefix("--data="))
        elif taking and word != "--data":
            data.append(word)
        elif not taking:
            rest.append(word)
    return [*rest, "--data", *data] if data else list(arguments)


def open_source(
    spec: str | os.PathLike | Sequence[str],
    *,
    split: Split | None = None,
    limit: int | None = None,
    heldout_fraction: float = 1 / 50,
    data_dir: str | os.PathLike | None = None,
    caption_key: str | None = None,
    image_key: str | None = None,
    template: str | None = None,
    where: Sequence[str] = (),
) -> Source:
    """The source that `spec` names, or the mixture of several; if given, only its `split`, and the
    first `limit` records of that.

    `data_dir` is where `tfds:` sets are prepared (default: tensorflow-datasets' own); the others
    are as in `Opening`. Raises ValueError, in one line, for a source that does not exist, has no
    picture or is damaged.
    """
    specs = [str(spec)] if isinstance(spec, (str, os.PathLike)) else [str(one) for one in spec]
    if not specs:
        raise UserError("--data names no source")
    reading = _Reading(heldout_fraction, data_dir, caption_key, image_key)
    parts, weights = zip(*map(_weighted, specs), strict=True)
    sources = []
    for part in parts:
        one = reading.open(part)
        one = one if template is None else choosing.with_template(one, template)
        sources.append(choosing.where(one, where) if where else one)
    source = sources[0] if len(sources) == 1 else choosing.mixture(sources, weights)
    if split is not None:
        source = source.split(split)
    return source if limit is None else source.take(limit)


def _weighted(spec: str) -> tuple[str, float]:
    """`A=0.7` as its two parts; the weight is 1 if none is given."""
    name, equals, weight = spec.rpartition("=")
    if equals and re.fullmatch(r"\d+(\.\d*)?|\.\d+", weight) and not Path(spec).exists():
        return name, float(weight)
    return spec, 1.0


def demo_captions() -> list[str]:
    """64 captions of the bundled training set whose pictures are easy to tell apart."""
    text = resources.files("imagen_jax.data").joinpath("bundled/demo_captions.txt").read_text()
    return text.splitlines()


@dataclass(frozen=True)
class _Reading:
    """How to read one source."""

    heldout_fraction: float
    data_dir: str | os.PathLike | None
    caption_key: str | None
    image_key: str | None

    @property
    def keys(self) -> dict[str, str | None]:
        return {"caption_key": self.caption_key, "image_key": self.image_key}

    def open(self, spec: str) -> Source:
        fraction = self.heldout_fraction
        if spec == "bundled":
            return _bundled()
        if spec == "scenes" or spec.startswith("scenes:"):
            return scene_source.open_scenes(spec.partition(":")[2] or None)
        if spec.startswith("tfds:"):
            name, part = _named(spec, r"tfds:(.+?(?::\d+\.\d+\.\d+)?)(?::([^:]+))?")
            return readers.prepared(
                name, part, data_dir=self.data_dir, heldout_fraction=fraction, **self.keys
            )
        if spec.startswith("hf:"):
            name, part = _named(spec, r"hf:(.+?)(?::([^:]+))?")
            return hugging_face.dataset(name, part, heldout_fraction=fraction, **self.keys)
        if _is_folder(spec):
            return self._folder(spec)
        paths = [spec] if Path(spec).is_file() else files.matching(spec)
        if not paths:
            raise UserError(
                f"no source {spec!r}: give 'bundled', 'scenes', a folder, a .tar shard or a glob "
                "of them, a .csv, .jsonl or .parquet, or tfds:NAME[:SPLIT] or hf:NAME[:SPLIT]"
            )
        return self._files(paths)

    def _files(self, paths: Sequence[str]) -> Source:
        fraction = self.heldout_fraction
        found = {kinds.split_name(path)[1] for path in paths}
        if found == {"array_record"}:
            return array_records.array_records(paths, heldout_fraction=fraction, **self.keys)
        if len(paths) == 1 and found <= set(tables.TABLES):
            return tables.table(paths[0], heldout_fraction=fraction, **self.keys)
        for path in paths:
            if kinds.split_name(path)[1] in kinds.ARCHIVES:
                raise UserError(f"{path} is not a plain .tar: unpack it to one, or to a folder")
            if not _is_shard(path) or not (is_remote(path) or Path(path).is_file()):
                raise UserError(f"{path} is neither a folder nor a .tar shard")
        return shards.tar_shards(paths, heldout_fraction=fraction, caption_key=self.caption_key)

    def _folder(self, path: str) -> Source:
        """The shards below a folder, or the pictures. Raises UserError if it has both."""
        path = path.rstrip("/") or path
        left_out: dict[str, str] = {}
        names = readers.files_below(path, left_out)
        fraction, key = self.heldout_fraction, self.caption_key
        tars = [name for name in names if _is_shard(name)]
        listed = [name for name in tables.METADATA if name in names]
        if not tars and listed:
            if len(listed) > 1:
                raise UserError(f"{path} contains {' and '.join(listed)}: name one of them")
            return tables.table(
                f"{path}/{listed[0]}",
                heldout_fraction=fraction,
                names=names,
                left_out=left_out,
                **self.keys,
            )
        if not tars:
            return readers.folder(path, names, left_out, heldout_fraction=fraction, caption_key=key)
        pictures = [name for name in names if kinds.split_name(name)[1] in kinds.PICTURES]
        if pictures:
            raise UserError(
                f"{path} contains pictures ({len(pictures)}: {shown(pictures[0])}) and shards "
                f"({len(tars)}: {shown(tars[0])}): give the shards as a pattern, or move the "
                "pictures"
            )
        source = shards.tar_shards(
            [f"{path}/{name}" for name in tars], heldout_fraction=fraction, caption_key=key
        )
        archives = {name: kinds.why_not(kinds.split_name(name)[1]) for name in names}
        archives = {name: reason for name, reason in archives.items() if reason}
        return replace(source, left_out={**source.left_out, **left_out, **archives})


def _named(spec: str, pattern: str) -> tuple[str, str | None]:
    match = re.fullmatch(pattern, spec)
    if match is None:
        kind = spec.partition(":")[0]
        raise UserError(f"{spec!r} does not name a set: write {kind}:NAME or {kind}:NAME:SPLIT")
    return match[1], match[2]


def _is_folder(spec: str) -> bool:
    if not is_remote(spec):
        return Path(spec).is_dir()
    if spec.startswith("http") or kinds.split_name(spec.rstrip("/"))[1] or "*" in spec:
        return False
    system, name = files.remote(spec)
    return system.isdir(name)


def _is_shard(name: str) -> bool:
    return kinds.split_name(name)[1] == "tar"


def _bundled() -> Source:
    """The shard in the package; its metadata says which captions are held out."""
    shard = str(resources.files("imagen_jax.data").joinpath("bundled/00000.tar"))
    source = shards.tar_shards([shard], heldout_fraction=0.0)
    split = [source.read.columns(i)["split"] for i in range(len(source))]
    return replace(source, name="bundled", heldout=np.array(split) == "heldout")
