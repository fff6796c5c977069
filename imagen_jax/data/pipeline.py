"""Batches from a source: decoded, cropped, shuffled, in an order that is a function of the step.

Batch k holds the records order[k·b], ..., order[k·b + b - 1] of an endless order in which every
epoch is another permutation, fixed by the seed. Nothing else enters, so the position is one
integer, the number of threads or worker processes changes nothing, and one process of many reads
its `rows` of the same global batch. A record that cannot be used is replaced by the next
usable one *of the source*, which keeps batch k a function of k.
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
import numpy as np
from jaxtyping import Float, Int32, UInt8

from imagen_jax.data.images import decode
from imagen_jax.data.records import Record, Source
from imagen_jax.errors import UserError
from imagen_jax.types import Size, pair

logger = logging.getLogger(__name__)

Tokenize = Callable[[list[str]], Int32[np.ndarray, "b l"]]
Skipped = dict[str, str]  # record key -> why it cannot be used


class Example(NamedTuple):
    """One decoded record; `skipped` are the unusable ones it replaces."""

    image: UInt8[np.ndarray, "h w c"]
    caption: str | None
    embeds: Float[np.ndarray, "l d"] | None
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
    text_len: int = 256,
    rows: Sequence[int] | None = None,
    threads: int = 4,
    workers: int = 0,
    cache_bytes: int = 512 * 2**20,
    on_skip: Callable[[str, str], None] | None = None,
) -> "Batches":
    """An endless iterator of batches, starting at step `start_step`.

    A batch is {"images": uint8 (b, h, w, c)}, with (h, w) = `image_size`, and, with `tokenize`,
    "tokens": int32 (b, l). Where the source has stored embeddings, "text_embeds": float32
    (b, text_len, d) and "text_masks": bool (b, text_len) replace the tokens, truncated or padded
    with zeros. `rows` are the rows of the global batch that this process reads (default: all
    `batch_size`).

    `flip` mirrors half of the images, which is wrong where captions mention left or right.
    `threads` of this process decode ahead; `workers` processes replace them where that is too slow
    (needs a picklable source). Decoded images are kept if all of them fit in `cache_bytes` (never
    with workers). `on_skip(key, reason)` is called once per unusable record (default: a logged
    warning).

    Raises UserError for arguments out of range and for a source without a usable image.
    """
    size = pair(image_size)
    rows = range(batch_size) if rows is None else rows
    _check(size, batch_size, seed, start_step, channels, rows, threads, workers)
    fits = len(source) * math.prod(size) * channels <= cache_bytes
    wants_caption = tokenize is not None and not source.has_embeds
    cache = {} if fits and not workers else None
    if not len(source):
        held = f"{source.heldout.sum()} of {len(source.keys)} are held out (heldout_fraction)"
        raise UserError(f"{source.name}: no records; {held}")
    pictures = _Pictures(source, size, channels, wants_caption, cache)
    pictures[0]  # a source without a usable image fails here and not in a thread
    order = grain.MapDataset.source(range(len(source))).seed(seed)
    order = (order.shuffle() if shuffle else order).repeat()
    flip_seed = seed if flip else None
    steps = _Steps(pictures, order, batch_size, rows, start_step, flip_seed, workers > 0)
    iterator = _prefetch(grain.MapDataset.source(steps), threads, workers)
    return Batches(iterator, tokenize, text_len, on_skip or _warn)


def _check(
    size: Size,
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


class Batches(Iterator[dict[str, np.ndarray]]):
    """Iterator over batches. `close()`, or leaving a `with` block, ends the threads or worker
    processes that read ahead."""

    def __init__(
        self,
        iterator: grain.DatasetIterator,
        tokenize: Tokenize | None,
        text_len: int,
        on_skip: Callable[[str, str], None],
    ):
        self._skipped: set[str] = set()
        # grain's iterators complain if they are still alive when the interpreter takes modules
        # apart, so the only reference is in a list that is emptied at exit, at the latest.
        self._iterator = [iterator]
        self._close = weakref.finalize(self, _close, self._iterator)
        self._tokenize = tokenize
        self._text_len = text_len
        self._on_skip = on_skip

    def __next__(self) -> dict[str, np.ndarray]:
        if not self._iterator:
            raise UserError("these batches are closed: make new ones, from the step wanted")
        step = next(self._iterator[0])
        images, captions, embeds, skipped = pickle.loads(step) if type(step) is bytes else step
        for key, reason in skipped.items():
            if key not in self._skipped:
                self._skipped.add(key)
                self._on_skip(key, reason)
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


@dataclass(frozen=True)
class _Pictures:
    """Record i decoded, or the next usable one after it. Safe to share between threads."""

    source: Source
    image_size: Size
    channels: int
    wants_caption: bool
    cache: dict[int, Example] | None  # None: decode every time
    unusable: dict[int, str] = field(default_factory=dict)

    def __getitem__(self, i: int) -> Example:
        count, skipped = len(self.source), {}
        for j in (k % count for k in range(i, i + count)):
            if j not in self.unusable:
                try:
                    return self._example(j)._replace(skipped=skipped)
                except UserError as error:
                    self.unusable[j] = str(error)
            skipped[self.source.key(j)] = self.unusable[j]
        key, reason = next(iter(skipped.items()))
        raise UserError(
            f"{self.source.name}: none of {count} records can be used; the first: {key}: {reason}"
        )

    def _example(self, i: int) -> Example:
        if self.cache is not None and i in self.cache:
            return self.cache[i]
        record = self.source[i]
        if self.wants_caption:
            check_caption(record)
        image = decode(record.image, image_size=self.image_size, channels=self.channels)
        example = Example(image, record.caption, record.embeds, {})
        if self.cache is not None:
            self.cache[i] = example
        return example


@dataclass(frozen=True)
class _Steps:
    """The batches as a random-access sequence, which is what grain reads ahead in."""

    pictures: _Pictures
    order: grain.MapDataset
    batch_size: int
    rows: Sequence[int]
    start_step: int
    flip_seed: int | None
    pickled: bool  # worker processes return bytes

    def __len__(self) -> int:
        return sys.maxsize // self.batch_size - self.start_step

    def __getitem__(self, i: int) -> tuple | bytes:
        first = (self.start_step + i) * self.batch_size
        examples = [self.pictures[self.order[first + row]] for row in self.rows]
        images = np.stack([example.image for example in examples])
        if self.flip_seed is not None:
            coins = [np.random.default_rng((self.flip_seed, first + row)) for row in self.rows]
            mirrored = np.array([coin.random() < 0.5 for coin in coins])
            images[mirrored] = images[mirrored, :, ::-1]
        embeds = [example.embeds for example in examples]
        skipped = {key: why for example in examples for key, why in example.skipped.items()}
        captions = [example.caption for example in examples]
        step = images, captions, None if embeds[0] is None else embeds, skipped
        # grain would put arrays into shared memory, and leak those in flight at the end.
        return pickle.dumps(step) if self.pickled else step


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
    padded = np.zeros((len(embeds), length, widths[0]), np.float32)
    mask = np.zeros((len(embeds), length), bool)
    for i, embed in enumerate(embeds):
        real = min(length, len(embed))
        padded[i, :real] = embed[:real]
        mask[i, :real] = True
    return padded, mask


def check_caption(record: Record) -> None:
    """Raises UserError for a record without a caption."""
    if not record.caption:
        raise UserError("no caption" if record.caption is None else "empty caption")


def _warn(key: str, reason: str) -> None:
    logger.warning("skipped %s: %s", key, reason)
