"""A source of pictures: a random-access sequence of records, as bytes, with a fixed held-out part.

Nothing is decoded here. A `Source` is a value: splitting or shortening it gives another view of the
same records, and it travels to worker processes by pickling, so readers hold no open files.
"""

import hashlib
import io
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple, SupportsIndex, overload

import numpy as np
import PIL.Image
from jaxtyping import Bool, Int, Int64, UInt8, UInt32
from PIL import ExifTags

from imagen_jax.errors import UserError
from imagen_jax.types import Size

Split = Literal["train", "heldout"]
Image = bytes | np.ndarray | Callable[[Size], np.ndarray]

LOOKED_AT = 16  # records whose images are part of a fingerprint
DRAWN = (32, 32)  # the size at which scenes are drawn for it
NAMED = 5  # captions that a message names


class Record(NamedTuple):
    """One picture as stored.

    `image` is an encoded file, uint8 pixels (h, w) or (h, w, c), or a function that draws them at a
    (height, width); `caption` is None if the source has none, and `more` are further captions of
    the same picture; `embeds` is a stored text embedding, float (l, d), or None.
    """

    key: str
    image: Image
    caption: str | None
    embeds: np.ndarray | None = None
    more: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, key: str, image: Image, captions: Sequence[str], embeds: np.ndarray | None = None
    ) -> "Record":
        """A record with all of its captions, or none."""
        first, *more = captions or (None,)
        return cls(key, image, first, embeds, tuple(more))

    @property
    def captions(self) -> tuple[str, ...]:
        """All captions. Raises NoCaption for a record without one."""
        return required(() if self.caption is None else (self.caption, *self.more))


class NoCaption(UserError):
    """A record without a caption, or with an empty one."""


def required(captions: tuple[str, ...]) -> tuple[str, ...]:
    """The captions of a record. Raises NoCaption if there is none, or an empty one."""
    if not captions or not captions[0]:
        raise NoCaption("empty caption" if captions else "no caption")
    return captions


class Strings(Sequence[str]):
    """Strings in one array of bytes: ten million names take little more than their letters do."""

    def __init__(self, letters: UInt8[np.ndarray, "m"], ends: Int64[np.ndarray, "n"]):
        self.letters, self.ends = letters, ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> "Strings":
        encodings = [encoded(one) for one in strings]
        ends = np.cumsum(np.fromiter(map(len, encodings), np.int64, len(encodings)))
        return cls(np.frombuffer(b"".join(encodings), np.uint8), ends)

    def __len__(self) -> int:
        return len(self.ends)

    @overload
    def __getitem__(self, i: SupportsIndex) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> Sequence[str]: ...
    def __getitem__(self, i):
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = range(len(self))[i]
        start = self.ends[i - 1] if i else 0
        return self.letters[start : self.ends[i]].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class Source:
    """The records `rows` of a set, each read on request.

    `read(i)` returns record i of the complete set and raises ValueError, in one line, for a damaged
    record; it may have methods that read less of it, `captions(i)` and `columns(i)`. `keys`, their
    `hashes` (32 bits each) and `heldout` are those of the complete set too. `has_embeds` means that
    every record of the set has a text embedding, which then replaces the caption. `left_out` has
    the files and members that did not become records, with the reason, and `notes` what else a user
    should know before training.

    A mixture has `weights`, the share of each of its sets in a batch, and `parts`, the set that
    each record is from.
    """

    name: str
    keys: Sequence[str]
    read: Callable[[int], Record]
    heldout: Bool[np.ndarray, "n"]
    rows: Int[np.ndarray, "m"]
    hashes: UInt32[np.ndarray, "n"]
    has_embeds: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    parts: UInt8[np.ndarray, "n"] | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Record:
        return self.read(int(self.rows[i]))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def key(self, i: int) -> str:
        """The key of record i, without reading it."""
        return self.keys[int(self.rows[i])]

    def captions(self, i: int) -> tuple[str, ...]:
        """The captions of record i, without reading its image if the source can do so. Raises
        UserError for a record without one."""
        row = int(self.rows[i])
        return getattr(self.read, "captions", lambda row: self.read(row).captions)(row)

    def every_caption(self) -> Iterator[tuple[str, ...] | UserError]:
        """The captions of each record, or why it has none; each one once for an endless source."""
        if hasattr(self.read, "every_caption"):
            yield from self.read.every_caption()
            return
        for i in range(len(self)):
            try:
                yield self.captions(i)
            except UserError as error:
                yield UserError(f"{self.key(i)}: {error}")

    def columns(self, i: int) -> Mapping[str, Any]:
        """What else the source has on record i; {} if nothing."""
        return getattr(self.read, "columns", lambda row: {})(int(self.rows[i]))

    def size(self, i: int) -> Size:
        """Height and width of record i in pixels: from its columns, or the header of its image.
        Raises UserError if neither has them."""
        columns = self.columns(i)
        found = columns.get("height"), columns.get("width")
        if all(isinstance(side, (int, float)) and side >= 1 for side in found):
            return int(found[0]), int(found[1])
        image = self[i].image
        if isinstance(image, np.ndarray):
            return image.shape[0], image.shape[1]
        if callable(image):
            raise UserError("drawn at any size")
        return stored_size(image)

    def fingerprint(self) -> str:
        """A hash of the keys in their order, which decide what image a step sees, and of the images
        of a few records, as other sets may have the same names. Where the set is stored does not
        matter."""
        digest = hashlib.blake2b(self.hashes[self.rows].astype("<u4"), digest_size=8)
        for i in {j * len(self) // LOOKED_AT: None for j in range(LOOKED_AT if len(self) else 0)}:
            try:
                image = self[i].image
            except UserError:  # an unreadable record counts by its key only
                continue
            if callable(image):
                image = image(DRAWN)
            digest.update(image if isinstance(image, bytes) else image.tobytes())
        return digest.hexdigest()

    def split(self, which: Split) -> "Source":
        """The records to train on, or those held out; fixed for a set whatever its order."""
        if which not in ("train", "heldout"):
            raise UserError(f"split must be 'train' or 'heldout', got {which!r}")
        chosen = self.heldout[self.rows] == (which == "heldout")
        return replace(self, name=f"{self.name} ({which})", rows=self.rows[chosen])

    def take(self, limit: int) -> "Source":
        """The first `limit` records, or all if there are fewer; of a mixture, those of each set."""
        if limit < 1:
            raise UserError(f"limit must be at least 1, got {limit}")
        if self.parts is None:
            return replace(self, rows=self.rows[:limit])
        own = self.parts[self.rows]
        rows = [self.rows[own == part][:limit] for part in range(len(self.weights))]
        return replace(self, rows=np.concatenate(rows))

    def with_captions(self, captions: Iterable[str]) -> "Source":
        """All records with these captions, in the order of the captions, then of the set.

        Reads the complete set: for small ones. A record that cannot be read has no caption. Raises
        UserError naming captions that no record has.
        """
        found: dict[str, list[int]] = {caption: [] for caption in captions}
        for i in range(len(self)):
            try:
                own = self.captions(i)
            except UserError:
                continue
            for caption in own:
                if caption in found:
                    found[caption].append(i)
        if absent := [caption for caption, rows in found.items() if not rows]:
            more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
            raise UserError(
                f"{self.name}: no picture with the caption {', '.join(absent[:NAMED])}{more}"
            )
        return replace(self, rows=self.rows[[i for rows in found.values() for i in rows]])


def stored_size(image: bytes) -> Size:
    """Height and width of an encoded image, upright, by its header. Raises UserError if damaged."""
    try:
        picture = PIL.Image.open(io.BytesIO(image))
        turned = _is_turned(picture)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError("corrupt picture: no known format") from error
    except PIL.Image.DecompressionBombError as error:
        most = 2 * PIL.Image.MAX_IMAGE_PIXELS
        raise UserError(f"too large: at most {most:,} pixels are read") from error
    width, height = picture.size
    return (width, height) if turned else (height, width)


def _is_turned(picture: PIL.Image.Image) -> bool:
    """Whether the image is stored lying on its side."""
    if picture.format == "TIFF":  # pillow turns it itself, and gives its size after that
        return False
    # The method of a PNG decodes it, as EXIF may come after the pixels.
    exif = PIL.Image.Image.getexif if picture.format == "PNG" else type(picture).getexif
    return exif(picture).get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def key_hashes(keys: Iterable[str]) -> UInt32[np.ndarray, "n"]:
    """The CRC-32 of each key."""
    return np.fromiter((zlib.crc32(encoded(key)) for key in keys), np.uint32)


def hashed_heldout(hashes: UInt32[np.ndarray, "n"], fraction: float) -> Bool[np.ndarray, "n"]:
    """Mark about `fraction` of the keys, each by its own hash: adding others changes none."""
    if not 0 <= fraction < 1:
        raise UserError(f"heldout_fraction must be in [0, 1), got {fraction}")
    return hashes < fraction * 2**32


def encoded(key: str) -> bytes:
    """A key as bytes; for a file name, its bytes on disk."""
    return key.encode("utf-8", "surrogateescape")
