"""Text embeddings of captions, encoded once and read instead of running a text encoder.

    DIR/text_encoder.json       which encoder made them (imagen_jax/text/identity.py)
    DIR/embeddings.json         how they are stored: a `Form`
    DIR/00000.array_record      one embedding per record, without padding; or with padding, and
                                then followed by its number of tokens
    DIR/00000.npy               128-bit hashes of their captions, in the same order

A caption is stored once, however many records have it. The hashes of a shard are written after the
shard: a shard without them was interrupted and is written again. `python -m imagen_jax.data.embed`
makes such a folder.
"""

import functools
import hashlib
import io
import itertools
import os
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import ml_dtypes
import numpy as np
from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from etils import epath
from jaxtyping import Float, UInt64

from imagen_jax import storage
from imagen_jax.data.records import NoCaption
from imagen_jax.errors import UserError
from imagen_jax.fields import Config
from imagen_jax.types import AnyArray

FORM = "embeddings.json"
Stored = Literal["bfloat16", "float32", "int8"]
COUNT = 4  # bytes of the number of tokens that follows an embedding with padding
_BYTES = {"bfloat16": 2, "float32": 4, "int8": 1}


@dataclass(frozen=True, kw_only=True)
class Form(Config):
    """How captions are encoded, and how their embeddings are stored."""

    width: int
    """Width of the embeddings, the cascade's `text_embed_dim`."""
    dtype: Stored = "bfloat16"
    """`int8` has a float32 scale for each token besides."""
    keeps_padding: bool = False
    """Whether padded positions are kept, as for DeepFloyd IF."""
    cleans: bool = False
    """Whether captions were cleaned first, as for DeepFloyd IF."""

    def __post_init__(self):
        self._check_types()

    def size(self, tokens: int | float) -> int | float:
        """Bytes that this number of tokens takes."""
        scale = 4 if self.dtype == "int8" else 0
        return tokens * (self.width * _BYTES[self.dtype] + scale)

    def pack(self, embeds: Float[AnyArray, "l d"], tokens: int | None = None) -> bytes:
        """The record of an embedding; `tokens` of its positions are not padding (default: all)."""
        if self.keeps_padding:
            plain = replace(self, keeps_padding=False).pack(embeds)
            return plain + struct.pack("<I", len(embeds) if tokens is None else tokens)
        if self.dtype != "int8":
            return embeds.astype(ml_dtypes.bfloat16 if self.dtype == "bfloat16" else "f4").tobytes()
        scale = np.maximum(np.abs(embeds).max(1, keepdims=True), 1e-30).astype(np.float32) / 127
        return scale.tobytes() + np.rint(embeds / scale).astype(np.int8).tobytes()

    def unpack(self, record: bytes, *, padding: bool = True) -> Float[AnyArray, "l d"]:
        """The embedding in a record: bfloat16 if stored so, otherwise float32. Without `padding`,
        padding that was kept is left out."""
        if self.keeps_padding:
            counted = len(record) % int(self.size(1)) == COUNT
            if not counted and not padding:
                raise UserError(
                    "the embedding was stored without its number of tokens: encode it again"
                )
            embeds, count = (record[:-COUNT], record[-COUNT:]) if counted else (record, b"")
            found = replace(self, keeps_padding=False).unpack(embeds)
            return found if padding else found[: int.from_bytes(count, "little")]
        length, rest = divmod(len(record), int(self.size(1)))
        if rest or not length:
            raise UserError(f"a stored embedding of {len(record)} bytes is damaged")
        if self.dtype != "int8":
            dtype = ml_dtypes.bfloat16 if self.dtype == "bfloat16" else np.float32
            return np.frombuffer(record, dtype).reshape(length, self.width)
        scale = np.frombuffer(record, np.float32, length)[:, None]
        return scale * np.frombuffer(record, np.int8, offset=4 * length).reshape(length, self.width)


@dataclass(frozen=True)
class Embeddings:
    """A folder of embeddings, read by caption. Pickles, and is safe to share between threads."""

    folder: str
    form: Form
    records: ArrayRecordDataSource | None = field(repr=False)  # None: no shard yet
    hashes: UInt64[np.ndarray, "n 2"] = field(repr=False)  # sorted by the first column
    places: np.ndarray = field(repr=False)  # number of each one's record
    padding: bool = True  # whether to return padding that was kept

    @classmethod
    def open(cls, folder: str | os.PathLike, *, padding: bool = True) -> "Embeddings":
        """Without `padding`, padded positions that were kept are left out.

        Raises UserError if the folder has no embeddings, or is damaged.
        """
        path = storage.folder(folder)
        form = read_form(path)
        if form is None:
            raise UserError(
                f"{path} contains no stored embeddings: create them with "
                "`python -m imagen_jax.data.embed`."
            )
        shards = complete_shards(path)
        hashes = [_read_hashes(shard) for shard in shards]
        records = None
        if shards:
            records = ArrayRecordDataSource([_records(shard) for shard in shards])
        if (0 if records is None else len(records)) != sum(map(len, hashes)):
            raise UserError(f"{path}: the shards and the hashes of their captions do not agree.")
        every = np.concatenate([np.zeros((0, 2), np.uint64), *hashes])
        order = np.argsort(every[:, 0], kind="stable")
        return cls(str(path), form, records, every[order], order, padding)

    def __len__(self) -> int:
        return len(self.places)

    def __contains__(self, caption: str) -> bool:
        return self._find(caption) is not None

    def __getitem__(self, caption: str) -> Float[AnyArray, "l d"]:
        """Raises NoCaption for a caption that is not there."""
        return self.of([caption])[0]

    def of(self, captions: Sequence[str]) -> list[Float[AnyArray, "l d"]]:
        """The embeddings of captions. Raises NoCaption for one that is not there."""
        self.check(captions)
        places = [int(self.places[self._find(caption)]) for caption in captions]
        unpack = functools.partial(self.form.unpack, padding=self.padding)
        return [unpack(record) for record in self.records.__getitems__(places)]

    def check(self, captions: Iterable[str]) -> None:
        """Raises NoCaption for the first caption that is not there."""
        for caption in captions:
            if caption not in self:
                raise NoCaption(f"no stored embedding for its caption, {caption[:60]!r}")

    def _find(self, caption: str) -> int | None:
        first, second = hashed([caption])[0]
        i = int(np.searchsorted(self.hashes[:, 0], first))
        while i < len(self.hashes) and self.hashes[i, 0] == first:
            if self.hashes[i, 1] == second:
                return i
            i += 1
        return None


def hashed(captions: Iterable[str]) -> UInt64[np.ndarray, "n 2"]:
    """A 128-bit hash of each caption."""
    encoded = (caption.encode("utf-8", "surrogatepass") for caption in captions)
    digests = b"".join(hashlib.blake2b(one, digest_size=16).digest() for one in encoded)
    return np.frombuffer(digests, "<u8").reshape(-1, 2)


def read_form(folder: epath.Path) -> Form | None:
    """How the folder's embeddings are stored; None if it has none yet."""
    if not (folder / FORM).exists():
        return None
    try:
        return Form.from_dict(storage.read_object(folder / FORM))
    except TypeError as error:
        raise UserError(f"{folder / FORM}: {error}") from error


def complete_shards(folder: epath.Path) -> list[epath.Path]:
    """The files of hashes, one for each shard that was written completely."""
    return sorted(path for path in folder.glob("*.npy") if path.stem.isdecimal())


def write_shard(
    folder: epath.Path,
    form: Form,
    captions: Sequence[str],
    embeds: Sequence[np.ndarray],
    tokens: Sequence[int],
    part: tuple[int, int] = (0, 1),
) -> None:
    """Adds a shard of embeddings (l, d), one per caption, with their numbers of tokens. Each of
    several processes writes its `part` (i, n): every n-th shard from number i on."""
    numbers = (folder / f"{number:05}.npy" for number in itertools.count(*part))
    shard = next(path for path in numbers if not path.exists())
    # One embedding per group, so that each can be read alone; they do not compress.
    writer = ArrayRecordWriter(_records(shard), "group_size:1,uncompressed")
    for one, count in zip(embeds, tokens, strict=True):
        writer.write(form.pack(one, count))
    writer.close()
    file = io.BytesIO()
    np.save(file, hashed(captions))
    storage.write_bytes(shard, file.getvalue())


def _records(shard: epath.Path) -> str:
    return os.fspath(shard.with_suffix(".array_record"))


def _read_hashes(shard: epath.Path) -> UInt64[np.ndarray, "n 2"]:
    try:
        with shard.open("rb") as file:
            hashes = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise UserError(f"{shard} is damaged.") from error
    if hashes.dtype != np.uint64 or hashes.ndim != 2:
        raise UserError(f"{shard} does not contain caption hashes.")
    return hashes
