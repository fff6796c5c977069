"""Readers: a folder, or a prepared tensorflow-datasets set, as a `Source`; shards.py reads tars.

Each returns keys and a picklable `read(i)`; opening looks at names alone. What became no record is
in the source's `left_out`.
"""

import errno
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from imagen_jax.data import kinds
from imagen_jax.data.records import Record, Source, hashed_heldout
from imagen_jax.data.written import caption
from imagen_jax.errors import UserError, first_line

NOT_ALL_EMBEDDED = "a stored embedding, where not all pictures have one"
CAPTION_FEATURES = ("caption", "text", "captions")

# What is wrong with one file for good. Any other error of the system may pass, and ends a run:
# a record that is left out for it would be another picture than before in every later epoch.
_FOR_GOOD = (
    *(errno.ENOENT, errno.EISDIR, errno.EACCES, errno.EPERM),
    *(errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO),
)


def files_below(path: Path, left_out: dict[str, str]) -> list[str]:
    """Every file below a folder, as sorted paths relative to it, hidden ones and those in hidden
    folders not among them. Folders that were not entered are added to `left_out`."""
    names: list[str] = []

    def closed(error: OSError) -> None:
        name = Path(error.filename).relative_to(path).as_posix()
        if name == ".":
            raise UserError(f"the folder {path} cannot be read: {error.strerror}") from error
        left_out[name] = f"a folder that cannot be read: {error.strerror}"

    for where, folders, files in os.walk(path, onerror=closed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(where).relative_to(path)
        for name in folders:
            if os.path.islink(os.path.join(where, name)):
                left_out[(inside / name).as_posix()] = "a link to a folder, which is not followed"
        names += [(inside / name).as_posix() for name in files if not name.startswith(".")]
    return sorted(names)


def folder(
    path: Path, names: Iterable[str], left_out: dict[str, str], *, heldout_fraction: float
) -> Source:
    """The pictures among `files_below` a folder, with what is beside them. Keys are their names.

    A `.npy` beside *every* picture is a stored text embedding. Raises UserError without a picture.
    """
    keys: list[str] = []
    stems: set[str] = set()
    beside: dict[str, dict[str, str]] = {}
    left_out = dict(left_out)
    for name in names:
        stem, kind = kinds.split_name(name)
        if kind in kinds.PICTURES:
            keys.append(name)
            stems.add(stem)
        elif kind in kinds.BESIDE:
            beside.setdefault(stem, {}).setdefault(kind, name[len(stem) + 1 :])
        elif reason := kinds.why_not(kind):
            left_out[name] = reason
        elif name.rpartition("/")[2] in ("metadata.jsonl", "metadata.csv"):
            left_out[name] = "a table of captions, which is not read"
    if not keys:
        raise UserError(f"no pictures ({', '.join(kinds.PICTURES)}) in the folder {path}")
    embedded = {stem for stem in stems if "npy" in beside.get(stem, ())}
    for stem, suffixes in beside.items():
        if stem not in stems:
            for kind in suffixes.keys() & {"txt", "caption"}:
                left_out[f"{stem}.{suffixes[kind]}"] = "a caption without a picture"
        elif stem in embedded and embedded < stems:
            left_out[f"{stem}.{suffixes['npy']}"] = NOT_ALL_EMBEDDED
    own: dict[tuple, dict[str, str]] = {}  # one for all records with equal files
    suffixes = [beside.get(kinds.split_name(key)[0], {}) for key in keys]
    suffixes = tuple(own.setdefault(tuple(sorted(found.items())), found) for found in suffixes)
    read = _FolderReader(path, tuple(keys), suffixes, has_embeds=embedded == stems)
    return make_source(
        str(path), keys, read, heldout_fraction, has_embeds=read.has_embeds, left_out=left_out
    )


@dataclass(frozen=True)
class _FolderReader:
    path: Path
    keys: tuple[str, ...]
    beside: tuple[dict[str, str], ...]  # kind -> suffix, as it is spelled
    has_embeds: bool

    def __call__(self, i: int) -> Record:
        key, beside = self.keys[i], self.beside[i]
        stem = kinds.split_name(key)[0]
        embeds = None
        if self.has_embeds:
            embeds = load_embedding(self._bytes(f"{stem}.{beside['npy']}"))
        text = kinds.read_caption(beside, lambda suffix: self._bytes(f"{stem}.{suffix}"))
        return Record(key, self._bytes(key), text, embeds)

    def _bytes(self, name: str) -> bytes:
        try:
            return (self.path / name).read_bytes()
        except OSError as error:
            if error.errno not in _FOR_GOOD:
                raise
            suffix = kinds.split_name(name)[1]
            raise UserError(f"the .{suffix} cannot be read: {error.strerror}") from error


def prepared(
    name: str, split: str | None, *, data_dir: str | os.PathLike | None, heldout_fraction: float
) -> Source:
    """A tensorflow-datasets set prepared as array_record, read without TensorFlow.

    `name` is NAME, NAME/CONFIG, NAME:VERSION or the folder that holds dataset_info.json. Without
    `split` the set's "train" is read, and its "heldout" or "validation" split, if there is one,
    is the held-out part; with a split the held-out part is a hash of it. The picture is the
    feature "image", the caption "caption", "text" or (the first of) "captions", COCO's nesting
    included. Keys are NAME/SPLIT/NUMBER.
    """
    import tensorflow_datasets as tfds

    try:
        if Path(name).joinpath("dataset_info.json").is_file():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        where = data_dir or os.environ.get("TFDS_DATA_DIR", tfds.core.constants.DATA_DIR)
        raise UserError(f"tfds:{name}: no such prepared set in {where}") from error
    if not builder.info.splits:
        raise UserError(
            f"tfds:{name}: not prepared in {builder.data_dir} (prepare it as array_record)"
        )
    features = builder.info.features
    if "image" not in features:
        raise UserError(f"tfds:{name}: no feature 'image', has {', '.join(features)}")
    main = split or "train"
    apart = next((s for s in ("heldout", "validation") if s in builder.info.splits), None)
    splits = [main] if split or apart is None else [main, apart]
    encoded = isinstance(features["image"], tfds.features.Image)
    decoders = {"image": tfds.decode.SkipDecoding()} if encoded else None
    try:
        parts = [builder.as_data_source(part, decoders=decoders) for part in splits]
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"tfds:{name}: cannot read split {main!r}: {first_line(error)}") from error
    keys = [
        f"{builder.name}/{s}/{i}"
        for s, part in zip(splits, parts, strict=True)
        for i in range(len(part))
    ]
    read = _TfdsReader(tuple(parts), tuple(keys))
    source = make_source(f"tfds:{name}", keys, read, heldout_fraction)
    if len(parts) == 1:
        return source
    return replace(source, heldout=np.arange(len(keys)) >= len(parts[0]))


@dataclass(frozen=True)
class _TfdsReader:
    parts: tuple[Any, ...]  # ArrayRecordDataSource, one per split
    keys: tuple[str, ...]

    def __call__(self, i: int) -> Record:
        key = self.keys[i]
        for part in self.parts:
            if i < len(part):
                example = part[i]
                break
            i -= len(part)
        return Record(key, example["image"], _feature_caption(example))


def _feature_caption(example: Mapping[str, Any]) -> str | None:
    """The caption of a tfds example: text, the first of a list, or a nested {"text": ...}."""
    value = next((example[name] for name in CAPTION_FEATURES if name in example), None)
    while not isinstance(value, (str, bytes)):
        if isinstance(value, Mapping):
            value = next((value[name] for name in ("text", "caption") if name in value), None)
        elif isinstance(value, (Sequence, np.ndarray)) and len(value):
            value = value[0]
        else:
            return None
    return caption(value)


def make_source(
    name: str,
    keys: list[str],
    read: Any,
    heldout_fraction: float,
    *,
    has_embeds: bool = False,
    left_out: Mapping[str, str] | None = None,
) -> Source:
    """All records of a set, those held out chosen by a hash of their keys."""
    heldout = hashed_heldout(keys, heldout_fraction)
    rows = np.arange(len(keys))
    return Source(name, tuple(keys), read, heldout, rows, has_embeds, left_out or {})


def load_embedding(data: bytes) -> np.ndarray:
    """A stored text embedding, float (l, d). Raises UserError for a damaged one."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"damaged .npy: {first_line(error)}") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"a stored embedding is float (l, d), got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise UserError("the stored embedding holds NaN or infinity")
    return array
