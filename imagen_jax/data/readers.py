"""Readers: a folder, tar shards, or a prepared tensorflow-datasets set, as a `Source`.

Each returns names and a picklable `read(i)`; opening looks at names and headers alone. Text files
are UTF-8; a caption's white space is trimmed, and an empty one stays empty (the pipeline says so).
A `.npy` beside *every* picture (float, (l, d)) is a stored text embedding.
"""

import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from imagen_jax.data.records import Record, Source, hashed_heldout
from imagen_jax.errors import UserError

PICTURES = ("jpg", "jpeg", "png", "webp", "tiff", "tif", "bmp")
CAPTION_FEATURES = ("caption", "text", "captions")


def folder(path: Path, *, heldout_fraction: float) -> Source:
    """Every picture under `path`, with the caption in the `.txt` of the same stem; hidden ones not.

    Keys are paths relative to the folder, sorted.
    """
    keys, stems, arrays = [], set(), set()
    for where, folders, files in os.walk(path):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            key = Path(where, name).relative_to(path).as_posix()
            stem, _, kind = key.rpartition(".")
            if name.startswith("."):
                continue
            if kind.lower() in PICTURES:
                keys.append(key)
                stems.add(stem)
            elif kind == "npy":
                arrays.add(stem)
    if not keys:
        raise UserError(f"no pictures ({', '.join(PICTURES)}) in the folder {path}")
    keys.sort()
    read = _FolderReader(path, tuple(keys), has_embeds=stems <= arrays)
    return _source(str(path), keys, read, heldout_fraction, has_embeds=read.has_embeds)


@dataclass(frozen=True)
class _FolderReader:
    path: Path
    keys: tuple[str, ...]
    has_embeds: bool

    def __call__(self, i: int) -> Record:
        picture = self.path / self.keys[i]
        text, array = picture.with_suffix(".txt"), picture.with_suffix(".npy")
        caption = text.read_bytes() if text.exists() else None
        embeds = _array(array.read_bytes()) if self.has_embeds else None
        return Record(self.keys[i], picture.read_bytes(), _text(caption), embeds)


def tar_shards(paths: Sequence[Path], *, heldout_fraction: float) -> Source:
    """img2dataset or webdataset shards: members of one stem are one record, in the shard's order.

    The headers are read once, for the offset of each member; records are then read at random. The
    caption is the `.txt`, or else "caption" in the `.json`. Keys are SHARD/STEM. Members without a
    picture are ignored. ValueError for a compressed, truncated or empty shard.
    """
    keys: list[str] = []
    rows: list[list[int]] = []
    common = Path(os.path.commonpath([path.parent for path in paths]))
    for number, path in enumerate(paths):
        prefix = path.relative_to(common).with_suffix("").as_posix()
        for stem, members in _index(path).items():
            if "picture" in members:
                keys.append(f"{prefix}/{stem}")
                found = (members.get(kind, (-1, 0)) for kind in ("picture", "txt", "json", "npy"))
                rows.append([number, *(value for place in found for value in place)])
    name = str(paths[0]) if len(paths) == 1 else f"{len(paths)} shards in {common}"
    if not keys:
        raise UserError(f"no pictures ({', '.join(PICTURES)}) in {name}")
    places = np.array(rows, dtype=np.int64)
    has_embeds = bool((places[:, 7] >= 0).all())
    read = _TarReader(tuple(map(str, paths)), tuple(keys), places, has_embeds)
    return _source(name, keys, read, heldout_fraction, has_embeds=has_embeds)


def _index(path: Path) -> dict[str, dict[str, tuple[int, int]]]:
    """stem -> kind -> (offset, size) of each file in a shard."""
    index: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as shard:
            for member in shard:
                where, _, name = member.name.rpartition("/")
                stem, _, kind = name.partition(".")
                kind = "picture" if kind.lower() in PICTURES else kind.lower()
                if member.isfile() and stem:
                    stem = f"{where}/{stem}" if where else stem
                    index.setdefault(stem, {})[kind] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise UserError(f"{path} is not a valid, uncompressed tar shard: {error}") from error
    return index


@dataclass(frozen=True)
class _TarReader:
    paths: tuple[str, ...]
    keys: tuple[str, ...]
    places: Int[np.ndarray, "n 9"]  # shard, then offset and size of picture, txt, json, npy
    has_embeds: bool

    def __call__(self, i: int) -> Record:
        shard, *places = self.places[i].tolist()
        with open(self.paths[shard], "rb") as file:
            picture, text, meta, array = (
                _member(file, places[k], places[k + 1]) for k in range(0, 8, 2)
            )
        caption = _text(text) if text is not None else _json(meta).get("caption")
        embeds = _array(array) if self.has_embeds else None
        return Record(self.keys[i], picture, caption if isinstance(caption, str) else None, embeds)

    def metadata(self, i: int) -> dict[str, Any]:
        """The `.json` of record i; {} without one."""
        shard, offset, size = self.places[i, [0, 5, 6]].tolist()
        with open(self.paths[shard], "rb") as file:
            return _json(_member(file, offset, size))


def _member(file: io.BufferedReader, offset: int, size: int) -> bytes | None:
    if offset < 0:
        return None
    file.seek(offset)
    return file.read(size)


def _json(text: bytes | None) -> dict[str, Any]:
    """A record's JSON; ValueError if it is damaged or not an object."""
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except ValueError as error:
        raise UserError(f"damaged .json: {error}") from error
    if not isinstance(value, dict):
        raise UserError("the .json is not an object")
    return value


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
        reason = " ".join(str(error).split("\n")[0].split())
        raise UserError(f"tfds:{name}: cannot read split {main!r}: {reason}") from error
    keys = [
        f"{builder.name}/{s}/{i}"
        for s, part in zip(splits, parts, strict=True)
        for i in range(len(part))
    ]
    read = _TfdsReader(tuple(parts), tuple(keys))
    source = _source(f"tfds:{name}", keys, read, heldout_fraction)
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
    return value.strip() if isinstance(value, str) else _text(value)


def _source(
    name: str, keys: list[str], read: Any, heldout_fraction: float, *, has_embeds: bool = False
) -> Source:
    heldout = hashed_heldout(keys, heldout_fraction)
    return Source(name, tuple(keys), read, heldout, np.arange(len(keys)), has_embeds)


def _text(data: bytes | None) -> str | None:
    if data is None:
        return None
    try:
        return data.decode("utf-8-sig").strip()
    except UnicodeDecodeError as error:
        raise UserError("the caption is not UTF-8") from error


def _array(data: bytes) -> np.ndarray:
    try:
        array = np.load(io.BytesIO(data), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise UserError(f"damaged .npy: {error}") from error
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.floating):
        raise UserError(f"a stored embedding is float (l, d), got {array.dtype} {array.shape}")
    if not np.isfinite(array).all():
        raise UserError("the stored embedding holds NaN or infinity")
    return array
