"""Readers: a folder, or a prepared tensorflow-datasets set, as a `Source`; shards.py reads tars.

Each returns keys and a picklable `read(i)`; opening looks only at names. Files that did not become
records are in the source's `left_out`.
"""

import errno
import io
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt32

from imagen_jax.data import files, kinds
from imagen_jax.data.records import Record, Source, Strings, hashed_heldout, key_hashes, required
from imagen_jax.data.written import captions, json_object
from imagen_jax.errors import UserError, first_line
from imagen_jax.storage import is_remote

NOT_ALL_EMBEDDED = "a stored embedding, but not all pictures have one"
CAPTION_KEYS = ("caption", "text", "captions", "sentences", "prompt")

# Permanent errors of one file. Any other system error may be temporary, and ends a run: leaving the
# record out would put another picture in its place in every later epoch.
_FOR_GOOD = (
    *(errno.ENOENT, errno.EISDIR, errno.EACCES, errno.EPERM),
    *(errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ENXIO),
)


def files_below(path: str, left_out: dict[str, str]) -> list[str]:
    """Every file below a folder, as sorted paths relative to it, without hidden files and folders.
    Folders that were not entered are added to `left_out`."""
    names: list[str] = []
    if is_remote(path):
        system, inside = files.remote(path)
        below = len(inside.rstrip("/")) + 1
        return sorted(name[below:] for name in system.find(inside) if "/." not in name[below - 1 :])

    def closed(error: OSError) -> None:
        name = Path(error.filename).relative_to(path).as_posix()
        if name == ".":
            raise UserError(f"the folder {path} cannot be read: {error.strerror}") from error
        left_out[name] = f"a folder that cannot be read: {error.strerror}"

    for where, folders, found in os.walk(path, onerror=closed):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(where).relative_to(path)
        for name in folders:
            if os.path.islink(os.path.join(where, name)):
                left_out[(inside / name).as_posix()] = "a link to a folder, which is not followed"
        names += [(inside / name).as_posix() for name in found if not name.startswith(".")]
    return sorted(names)


def folder(
    path: str,
    names: Iterable[str],
    left_out: dict[str, str],
    *,
    heldout_fraction: float,
    caption_key: str | None = None,
) -> Source:
    """The pictures among `files_below` a folder, with the files beside them. Keys are their names.

    Each line of a `.txt` is a caption. A `.npy` beside *every* picture is a stored text embedding.
    Raises UserError if there is no picture.
    """
    keys: list[str] = []
    stems: set[str] = set()
    beside: dict[str, dict[str, str]] = {}
    left_out = dict(left_out)
    for name in names:
        stem, kind = kinds.split_beside(name)
        if kind in kinds.PICTURES:
            keys.append(name)
            stems.add(stem)
        elif kind in kinds.BESIDE:
            beside.setdefault(stem, {}).setdefault(kind, name[len(stem) + 1 :])
        elif reason := kinds.why_not(kind):
            left_out[name] = reason
    if not keys:
        raise UserError(f"no pictures ({', '.join(kinds.PICTURES)}) in the folder {path}")
    embedded = {stem for stem in stems if "npy" in beside.get(stem, ())}
    for stem, suffixes in beside.items():
        if stem not in stems:
            for kind in suffixes.keys() & {"txt", "caption"}:
                left_out[f"{stem}.{suffixes[kind]}"] = "a caption without a picture"
        elif stem in embedded and embedded < stems:
            left_out[f"{stem}.{suffixes['npy']}"] = NOT_ALL_EMBEDDED
    own: dict[tuple, dict[str, str]] = {}  # shared by records with equal files
    suffixes = [beside.get(kinds.split_name(key)[0], {}) for key in keys]
    suffixes = tuple(own.setdefault(tuple(sorted(found.items())), found) for found in suffixes)
    strings = Strings.of(keys)
    read = _FolderReader(path, strings, suffixes, embedded == stems, caption_key)
    return make_source(
        path, strings, read, heldout_fraction, has_embeds=read.has_embeds, left_out=left_out
    )


@dataclass(frozen=True)
class _FolderReader:
    path: str
    keys: Sequence[str]
    beside: tuple[dict[str, str], ...]  # kind -> suffix, as it is spelled
    has_embeds: bool
    caption_key: str | None

    def __call__(self, i: int) -> Record:
        key, embeds = self.keys[i], None
        if self.has_embeds:
            embeds = load_embedding(self._bytes(f"{self._stem(i)}.{self.beside[i]['npy']}"))
        captions = self._captions(i)
        return Record.of(key, self._bytes(key), captions, embeds)

    def captions(self, i: int) -> tuple[str, ...]:
        return required(self._captions(i))

    def columns(self, i: int) -> Mapping[str, Any]:
        """The `.json` beside a picture, and as "label" the name of its folder."""
        key, suffix = self.keys[i], self.beside[i].get("json")
        data = self._bytes(f"{self._stem(i)}.{suffix}") if suffix else None
        return {"label": key.rpartition("/")[0].rpartition("/")[2], **json_object(data)}

    def _stem(self, i: int) -> str:
        return kinds.split_name(self.keys[i])[0]

    def _captions(self, i: int) -> tuple[str, ...]:
        stem = self._stem(i)
        return kinds.read_captions(
            self.beside[i],
            lambda suffix: self._bytes(f"{stem}.{suffix}"),
            key=self.caption_key,
            by_line=True,
        )

    def _bytes(self, name: str) -> bytes:
        return read_beside(self.path, name)


def read_beside(folder: str, name: str) -> bytes:
    """A file in a folder. Raises UserError for one that will never be readable."""
    try:
        return files.read_bytes(f"{folder}/{name}" if folder else name)
    except OSError as error:
        if error.errno not in _FOR_GOOD:
            raise
        suffix = kinds.split_name(name)[1]
        raise UserError(f"the .{suffix} cannot be read: {error.strerror}") from error


def prepared(
    name: str,
    split: str | None,
    *,
    data_dir: str | os.PathLike | None,
    heldout_fraction: float,
    caption_key: str | None = None,
    image_key: str | None = None,
) -> Source:
    """A tensorflow-datasets set prepared as array_record, read without TensorFlow.

    `name` is NAME, NAME/CONFIG, NAME:VERSION or the folder that holds dataset_info.json. Without
    `split` the set's "train" is read, and its "heldout" or "validation" split, if there is one,
    is the held-out part; with a split a hash chooses the held-out part. The picture is the feature
    "image" or `image_key`, the caption `caption_key` or one of CAPTION_KEYS: all captions of a
    list, including COCO's nested ones. Keys are NAME/SPLIT/NUMBER.
    """
    import tensorflow_datasets as tfds

    try:
        if Path(name).joinpath("dataset_info.json").is_file():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, data_dir=data_dir)
    except (tfds.core.DatasetNotFoundError, ValueError, AssertionError) as error:
        where = data_dir or os.environ.get("TFDS_DATA_DIR", tfds.core.constants.DATA_DIR)
        raise UserError(f"tfds:{name}: no prepared data set of this name in {where}") from error
    if not builder.info.splits:
        raise UserError(
            f"tfds:{name}: not prepared in {builder.data_dir} (prepare it as array_record)"
        )
    features = builder.info.features
    for key in (image_key or "image", *([] if caption_key is None else [caption_key])):
        if key not in features:
            raise UserError(f"tfds:{name}: no feature {key!r}; it has {', '.join(features)}")
    image_key = image_key or "image"
    main = split or "train"
    apart = next((s for s in ("heldout", "validation") if s in builder.info.splits), None)
    splits = [main] if split or apart is None else [main, apart]
    encoded = isinstance(features[image_key], tfds.features.Image)
    decoders = {image_key: tfds.decode.SkipDecoding()} if encoded else None
    labels = {
        key: tuple(feature.names)
        for key, feature in features.items()
        if isinstance(feature, tfds.features.ClassLabel)
    }
    try:
        parts = [builder.as_data_source(part, decoders=decoders) for part in splits]
    except (ValueError, KeyError, NotImplementedError) as error:
        raise UserError(f"tfds:{name}: cannot read split {main!r}: {first_line(error)}") from error
    keys = Strings.of(
        f"{builder.name}/{s}/{i}"
        for s, part in zip(splits, parts, strict=True)
        for i in range(len(part))
    )
    read = _TfdsReader(tuple(parts), keys, image_key, caption_key, labels)
    source = make_source(f"tfds:{name}", keys, read, heldout_fraction)
    if len(parts) == 1:
        return source
    return replace(source, heldout=np.arange(len(keys)) >= len(parts[0]))


@dataclass(frozen=True)
class _TfdsReader:
    parts: tuple[Any, ...]  # ArrayRecordDataSource, one per split
    keys: Sequence[str]
    image_key: str
    caption_key: str | None
    labels: Mapping[str, tuple[str, ...]]  # class names

    def __call__(self, i: int) -> Record:
        example = self._example(i)
        captions = found_captions(example, self.caption_key)
        return Record.of(self.keys[i], example[self.image_key], captions)

    def columns(self, i: int) -> Mapping[str, Any]:
        """The other features; class labels as their names."""
        example = {k: v for k, v in self._example(i).items() if k != self.image_key}
        return example | {
            key: names[int(example[key])]
            for key, names in self.labels.items()
            if 0 <= int(example[key]) < len(names)
        }

    def _example(self, i: int) -> Mapping[str, Any]:
        for part in self.parts:
            if i < len(part):
                return part[i]
            i -= len(part)
        raise IndexError(i)


def found_captions(example: Mapping[str, Any], key: str | None) -> tuple[str, ...]:
    """The captions in a record of named values: text, a list of texts, or nested {"text": ...}."""
    value = example.get(key) if key else _first(example, CAPTION_KEYS)
    if isinstance(value, Mapping):
        value = _first(value, CAPTION_KEYS)
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, Sequence) and not isinstance(value, (str, bytes)):
        value = [_first(one, CAPTION_KEYS) if isinstance(one, Mapping) else one for one in value]
    return () if value is None else captions(value)


def _first(values: Mapping[str, Any], names: Iterable[str]) -> Any:
    return next((values[name] for name in names if name in values), None)


def make_source(
    name: str,
    keys: Sequence[str],
    read: Any,
    heldout_fraction: float,
    *,
    hashes: UInt32[np.ndarray, "n"] | None = None,
    has_embeds: bool = False,
    left_out: Mapping[str, str] | None = None,
) -> Source:
    """All records of a set; a hash of their keys chooses those that are held out."""
    hashes = key_hashes(keys) if hashes is None else hashes
    heldout = hashed_heldout(hashes, heldout_fraction)
    rows = np.arange(len(keys))
    return Source(name, keys, read, heldout, rows, hashes, has_embeds, left_out or {})


def load_embedding(data: bytes) -> np.ndarray:
    """A stored text embedding, float (l, d). Raises UserError for a damaged one."""
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"damaged .npy: {first_line(error)}") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"a stored embedding must be float (l, d), got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise UserError("the stored embedding holds NaN or infinity")
    return array
