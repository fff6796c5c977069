"""A source of pictures: a random-access sequence of records, as bytes, with a fixed held-out part.

Nothing is decoded here. A `Source` is a value: splitting or shortening it gives another view of the
same records, and it travels to worker processes by pickling, so readers hold no open files.
"""

import hashlib
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from imagen_jax.errors import UserError
from imagen_jax.types import Size

Split = Literal["train", "heldout"]
Image = bytes | np.ndarray | Callable[[Size], np.ndarray]

LOOKED_AT = 16  # records whose images are part of a fingerprint
DRAWN = (32, 32)  # the size of those that are drawn
NAMED = 5  # captions that a message names


class Record(NamedTuple):
    """One picture as stored.

    `image` is an encoded file, uint8 pixels (h, w) or (h, w, c), or what draws these at a (height,
    width); `caption` is None where the source has none; `embeds` is a stored text embedding, float
    (l, d), or None.
    """

    key: str
    image: Image
    caption: str | None
    embeds: np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class Source:
    """The records `rows` of a set, each read on request.

    `read(i)` returns record i of the complete set and raises ValueError, in one line, for a damaged
    record; `keys` and `heldout` are those of the complete set too. `has_embeds` means that every
    record of the set has a text embedding, which then replaces the caption. `left_out` are the
    files and members that became no record, with the reason.
    """

    name: str
    keys: Sequence[str]
    read: Callable[[int], Record]
    heldout: Bool[np.ndarray, "n"]
    rows: Int[np.ndarray, "m"]
    has_embeds: bool = False
    left_out: Mapping[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> Record:
        return self.read(int(self.rows[i]))

    def __iter__(self) -> Iterator[Record]:
        return (self[i] for i in range(len(self)))

    def key(self, i: int) -> str:
        """The key of record i, without reading it."""
        return self.keys[int(self.rows[i])]

    def fingerprint(self) -> str:
        """A hash of the keys in their order, which decide what image a step sees, and of the images
        of a few records: sets of equal names differ. Where the set is stored does not matter."""
        digest = hashlib.blake2b(digest_size=8)
        for row in self.rows:
            digest.update(encoded(self.keys[row]) + b"\0")
        for i in {j * len(self) // LOOKED_AT: None for j in range(LOOKED_AT if len(self) else 0)}:
            try:
                image = self[i].image
            except UserError:  # a record that cannot be read has its key alone
                continue
            if callable(image):
                image = image(DRAWN)
            digest.update(image if isinstance(image, bytes) else image.tobytes())
        return digest.hexdigest()

    def split(self, which: Split) -> "Source":
        """The records to learn from, or those kept apart; fixed for a set whatever its order."""
        if which not in ("train", "heldout"):
            raise UserError(f"split must be 'train' or 'heldout', got {which!r}")
        chosen = self.heldout[self.rows] == (which == "heldout")
        return replace(self, name=f"{self.name} ({which})", rows=self.rows[chosen])

    def take(self, limit: int) -> "Source":
        """The first `limit` records, or all of them if there are fewer."""
        if limit < 1:
            raise UserError(f"limit must be at least 1, got {limit}")
        return replace(self, rows=self.rows[:limit])

    def with_captions(self, captions: Iterable[str]) -> "Source":
        """All records with these captions, in the order of the captions, then of the set.

        Reads the set once: meant for small ones. A record that cannot be read has no caption.
        Raises UserError naming captions that no record has.
        """
        found: dict[str, list[int]] = {caption: [] for caption in captions}
        for i in range(len(self)):
            try:
                caption = self[i].caption
            except UserError:
                continue
            if caption in found:
                found[caption].append(i)
        if absent := [caption for caption, rows in found.items() if not rows]:
            more = f" and {len(absent) - NAMED} more" if len(absent) > NAMED else ""
            raise UserError(
                f"{self.name}: no picture with the caption {', '.join(absent[:NAMED])}{more}"
            )
        return replace(self, rows=self.rows[[i for rows in found.values() for i in rows]])


def hashed_heldout(names: Iterable[str], fraction: float) -> Bool[np.ndarray, "n"]:
    """Mark about `fraction` of the names, each by its own CRC-32: adding others moves none."""
    if not 0 <= fraction < 1:
        raise UserError(f"heldout_fraction must be in [0, 1), got {fraction}")
    hashes = np.array([zlib.crc32(encoded(name)) for name in names], dtype=np.float64)
    return hashes < fraction * 2**32


def encoded(key: str) -> bytes:
    """A key as bytes, those of a file name as it is stored."""
    return key.encode("utf-8", "surrogateescape")
