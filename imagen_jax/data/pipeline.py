"""Batches from a source: decoded, cropped, shuffled, in an order that is a function of the step.

Which records batch k has is a function of k (order.py), so the position is one integer, the number
of threads or worker processes changes nothing, and one process of many reads its `rows` of the same
global batch. A record that cannot be used is replaced by the next usable one *of the source*, which
keeps batch k a function of k.
"""

import logging
import math
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import grain.python as grain
import ml_dtypes
import numpy as np
from jaxtyping import Float, Int32, UInt8

from imagen_jax.data.embeddings import Embeddings
from imagen_jax.data.images import TooSmall, decode
from imagen_jax.data.order import Crop, Draw, Draws, Order
from imagen_jax.data.records import NoCaption, Source
from imagen_jax.errors import UserError
from imagen_jax.types import AnyArray, Size, pair

logger = logging.getLogger(__name__)

FEW_DAMAGED = 10  # this many never end a run
NAMED = 3  # damaged records that a message names

Tokenize = Callable[[list[str]], Int32[np.ndarray, "b l"]]


class Why(NamedTuple):
    """Why a record cannot be used. `damaged`: it should have been usable, unlike a small image or
    one without a caption."""

    reason: str
    damaged: bool


Skipped = dict[str, Why]  # by the key of the record


class Example(NamedTuple):
    """One decoded record; `skipped` are the unusable ones it replaces."""

    image: UInt8[np.ndarray, "h w c"]
    captions: tuple[str, ...]  # () where they are not asked for
    embeds: Float[AnyArray, "l d"] | None
    skipped: Skipped


def make_batches(
    source: Source,
    *,
    image_size: int | Size,
    batch_size: int,
    seed: int,
    start_step: int = 0,
    tokenize: Tokenize | None = None,
    channels: int = 3,
    shuffle: bool = True,
    flip: bool = False,
    crop: Crop = "center",
    upsample: bool = False,
    buckets: Sequence[Size] = (),
    embeddings: Embeddings | None = None,
    text_len: int = 256,
    rows: Sequence[int] | None = None,
    threads: int = 4,
    workers: int = 0,
    cache_bytes: int = 512 * 2**20,
    max_damaged: float = 0.05,
    on_skip: Callable[[str, str], None] | None = None,
) -> "Batches":
    """An endless iterator of batches, starting at step `start_step`.

    A batch is {"images": uint8 (b, h, w, c)}, with (h, w) = `image_size`, and, with `tokenize`,
    "tokens": int32 (b, l). Where the source has stored embeddings, or `embeddings` has those of its
    captions, "text_embeds": float32, or bfloat16 as stored, (b, text_len, d) and "text_masks": bool
    (b, text_len) replace the tokens, truncated or padded with zeros. If a record has several
    captions, one is drawn each time it is used. `rows` are the rows of the global batch that this
    process reads (default: all `batch_size`).

    With `buckets`, sizes that replace `image_size`, all images of a batch have one of these sizes:
    the one with the nearest aspect ratio. Batches of a size are as frequent as its images. `crop`
    selects the part of an image to keep if its aspect ratio is another: the center, or a random
    part each time; `upsample` upsamples smaller images, which are unusable otherwise. `flip`
    mirrors half of the images, which is wrong if captions mention left or right. `threads` of this
    process decode ahead; `workers` processes replace them if that is too slow (needs a picklable
    source). Decoded images are kept if all of them fit in `cache_bytes` (never with workers or
    random crops). `on_skip(key, reason)` is called once per unusable record (default: a logged
    warning).

    Raises UserError for arguments out of range and for a source without a usable image; while
    iterating, once more than `max_damaged` of the records so far, and at least 10, were damaged.
    """
    sizes = [pair(size) for size in buckets] or [pair(image_size)]
    rows = range(batch_size) if rows is None else rows
    _check(source, sizes, batch_size, seed, start_step, channels, rows, threads, workers)
    fits = len(source) * max(map(math.prod, sizes)) * channels <= cache_bytes
    cache = {} if fits and not workers and crop == "center" else None
    wants_caption = not source.has_embeds and (tokenize is not None or embeddings is not None)
    pictures = _Pictures(source, channels, wants_caption, upsample, embeddings, cache)
    order = Order.of(source, sizes, batch_size, seed, shuffle)
    pictures.usable(*order.first)  # a source without a usable image fails here, not in a thread
    draws = Draws(seed, flip, crop)
    steps = _Steps(pictures, order, draws, batch_size, rows, start_step, workers > 0)
    iterator = _prefetch(grain.MapDataset.source(steps), threads, workers)
    damage = _Damage(source.name, max_damaged, len(source), len(rows))
    return Batches(iterator, tokenize, text_len, on_skip or _warn, damage)


def _check(
    source: Source,
    sizes: Sequence[Size],
    batch_size: int,
    seed: int,
    start_step: int,
    channels: int,
    rows: Sequence[int],
    threads: int,
    workers: int,
) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"seed must be in [0, 2**32), got {seed}")
    for size in sizes:
        if min(size) < 1:
            raise UserError(f"image_size must be at least 1x1, got {size[0]}x{size[1]}")
    for name, value in dict(batch_size=batch_size, threads=threads).items():
        if value < 1:
            raise UserError(f"{name} must be at least 1, got {value}")
    if start_step < 0 or workers < 0:
        raise UserError(f"start_step and workers must be >= 0, got {start_step} and {workers}")
    if channels not in (1, 3, 4):
        raise UserError(f"channels must be 1, 3 or 4, got {channels}")
    if not rows or not set(rows) <= set(range(batch_size)):
        raise UserError(
            f"rows must be a non-empty subset of 0..{batch_size - 1}; got {list(rows)}."
        )
    if not len(source):
        held = f"{source.heldout.sum()} of {len(source.keys)} are held out (heldout_fraction)"
        raise UserError(f"{source.name}: no records; {held}")


class Batches(Iterator[dict[str, np.ndarray]]):
    """Iterator over batches. `close()`, or leaving a `with` block, ends the threads or worker
    processes that read ahead."""

    def __init__(
        self,
        iterator: grain.DatasetIterator,
        tokenize: Tokenize | None,
        text_len: int,
        on_skip: Callable[[str, str], None],
        damage: "_Damage",
    ):
        self._skipped: set[str] = set()
        self._damage = damage
        # grain's iterators complain if they are still alive when the interpreter unloads modules,
        # so the only reference is in a list that is emptied at exit at the latest.
        self._iterator = [iterator]
        self._close = weakref.finalize(self, _close, self._iterator)
        self._tokenize = tokenize
        self._text_len = text_len
        self._on_skip = on_skip

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._iterator:
            raise UserError("these batches are closed: create new ones from the step you need")
        step = next(self._iterator[0])
        images, captions, embeds, skipped = pickle.loads(step) if type(step) is bytes else step
        for key, why in skipped.items():
            if key not in self._skipped:
                self._skipped.add(key)
                self._on_skip(key, why.reason)
        self._damage.count(skipped)
        batch = {"images": images}
        if embeds is not None:
            batch["text_embeds"], batch["text_masks"] = pad_embeds(embeds, self._text_len)
        elif self._tokenize is not None:
            batch["tokens"] = self._tokenize(captions)
        return batch

    def close(self) -> None:
        self._close()

    def __enter__(self) -> "Batches":
        return self

    def __exit__(self, *_) -> None:
        self.close()


@dataclass
class _Damage:
    """Counts the damaged records among those requested from a source."""

    source: str
    most: float
    records: int
    rows: int  # requested at a time
    steps: int = 0
    found: dict[str, str] = field(default_factory=dict)

    def count(self, skipped: Skipped) -> None:
        """Raises UserError once there are too many."""
        self.steps += 1
        self.found |= {key: why.reason for key, why in skipped.items() if why.damaged}
        asked = min(self.records, self.steps * self.rows)
        if len(self.found) > max(FEW_DAMAGED, self.most * asked):
            first = "; ".join(f"{key}: {why}" for key, why in list(self.found.items())[:NAMED])
            raise UserError(
                f"{self.source}: {len(self.found)} of {asked} records are damaged, more than "
                f"{100 * self.most:g} % (--max-damaged); the first: {first}"
            )


@dataclass(frozen=True)
class _Pictures:
    """Record i decoded, or the next usable one after it. Safe to share between threads."""

    source: Source
    channels: int
    wants_caption: bool
    upsample: bool
    embeddings: Embeddings | None
    cache: dict[tuple[int, Size], Example] | None  # None: decode every time
    unusable: dict[tuple[int, Size], Why] = field(default_factory=dict)

    def usable(self, i: int, size: Size, draw: Draw | None = None) -> Example:
        """`draw` chooses the crop (none: the center) and one of the captions (none: the first)."""
        count, skipped = len(self.source), {}
        for j in (k % count for k in range(i, i + count)):
            if (j, size) not in self.unusable:
                try:
                    example = self._example(j, size, draw)
                except UserError as error:
                    left_out = isinstance(error, (TooSmall, NoCaption))
                    self.unusable[j, size] = Why(str(error), damaged=not left_out)
                else:
                    captions = example.captions
                    if draw is not None and len(captions) > 1:
                        captions = captions[int(draw.caption * len(captions)) :]
                    return Example(example.image, captions[:1], example.embeds, skipped)
            skipped[self.source.key(j)] = self.unusable[j, size]
        key, why = next(iter(skipped.items()))
        raise UserError(
            f"{self.source.name}: none of {count} records can be used; the first: {key}: "
            f"{why.reason}"
        )

    def _example(self, i: int, size: Size, draw: Draw | None) -> Example:
        if self.cache is not None and (i, size) in self.cache:
            return self.cache[i, size]
        record = self.source[i]
        captions = ()
        if self.wants_caption:  # the source says why a record has none
            captions = record.captions if record.caption else self.source.captions(i)
        if self.embeddings is not None:
            self.embeddings.check(captions)
        image = decode(
            record.image,
            image_size=size,
            channels=self.channels,
            upsample=self.upsample,
            crop=None if draw is None else draw.crop,
        )
        example = Example(image, captions, record.embeds, {})
        if self.cache is not None:
            self.cache[i, size] = example
        return example


@dataclass(frozen=True)
class _Steps:
    """The batches as a random-access sequence, from which grain reads ahead."""

    pictures: _Pictures
    order: Order
    draws: Draws
    batch_size: int
    rows: Sequence[int]
    start_step: int
    pickled: bool  # worker processes return bytes

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size - self.start_step

    def __getitem__(self, i: int) -> tuple | bytes:
        step = self.start_step + i
        size, record = self.order(step)
        draws = [self.draws(step * self.batch_size + row) for row in self.rows]
        examples = [
            self.pictures.usable(record(row), size, draw)
            for row, draw in zip(self.rows, draws, strict=True)
        ]
        images = np.stack([example.image for example in examples])
        mirrored = np.array([draw.mirror for draw in draws])
        if mirrored.any():
            images[mirrored] = images[mirrored, :, ::-1]
        captions = [example.captions[0] if example.captions else None for example in examples]
        embeds = None
        if self.pictures.embeddings is not None:
            embeds = self.pictures.embeddings.of(captions)
        elif examples[0].embeds is not None:
            embeds = [example.embeds for example in examples]
        skipped = {key: why for example in examples for key, why in example.skipped.items()}
        batch = images, captions, embeds, skipped
        # grain would put arrays into shared memory, and leak those in flight at the end.
        return pickle.dumps(batch) if self.pickled else batch


def _prefetch(steps: grain.MapDataset, threads: int, workers: int) -> grain.DatasetIterator:
    ahead = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads)
    if not workers:
        return iter(steps.to_iter_dataset(ahead))
    # grain's workers read absl's flags, which a command line that is not absl's never parses.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    options = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
    return iter(steps.to_iter_dataset(one).mp_prefetch(options))


def _close(iterator: list[grain.DatasetIterator]) -> None:
    while iterator:
        iterator.pop().close()


def pad_embeds(embeds: list[np.ndarray], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Embeddings (l_i, d) to one (b, length, d), with the mask of the real tokens."""
    widths = sorted({embed.shape[1] for embed in embeds})
    if len(widths) > 1:
        raise UserError(f"stored embeddings of different widths in one set: {widths}")
    dtype = embeds[0].dtype if embeds[0].dtype == ml_dtypes.bfloat16 else np.float32
    padded = np.zeros((len(embeds), length, widths[0]), dtype)
    mask = np.zeros((len(embeds), length), bool)
    for i, embed in enumerate(embeds):
        real = min(length, len(embed))
        padded[i, :real] = embed[:real]
        mask[i, :real] = True
    return padded, mask


def _warn(key: str, reason: str) -> None:
    logger.warning("skipped %s: %s", key, reason)
