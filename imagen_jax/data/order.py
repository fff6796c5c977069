"""Which records a batch has, at which size, and what is drawn for each: functions of the step.

Batch k holds the records order[k·b], ..., order[k·b + b - 1] of an endless order in which every
epoch is another permutation, fixed by the seed (grain's). With several sizes, batches of each come
in proportion to its records, and each size has its own order.
"""

import functools
import hashlib
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NamedTuple

import grain.python as grain
import numpy as np
from jaxtyping import Int

from imagen_jax.data.records import Source
from imagen_jax.errors import UserError
from imagen_jax.types import Size

Crop = Literal["center", "random"]


@dataclass(frozen=True)
class Order:
    """Which records a step has, and at which size: a function of the step."""

    sizes: Sequence[Size]
    rows: Sequence[np.ndarray | None]  # per size; None: all
    steps: grain.MapDataset | None  # the number of each step's size, if there are several
    records: Sequence[grain.MapDataset]  # per size
    batch_size: int

    @classmethod
    def of(
        cls, source: Source, sizes: Sequence[Size], batch_size: int, seed: int, shuffle: bool
    ) -> "Order":
        if len(sizes) == 1:
            records = _endless(source, seed, shuffle, source.weights)
            return cls(sizes, [None], None, [records], batch_size)
        nearest = nearest_buckets(source, sizes)
        rows = [np.flatnonzero(nearest == i) for i in range(len(sizes))]
        sizes, rows = zip(
            *((s, r) for s, r in zip(sizes, rows, strict=True) if len(r)), strict=True
        )
        of_size = [replace(source, rows=source.rows[own]) for own in rows]
        records = [
            _endless(one, (seed + i) % 2**32, shuffle, shares(one, source))
            for i, one in enumerate(of_size)
        ]
        # Each size counts its own steps; `mix` then interleaves the sizes by their shares.
        counted = [
            grain.MapDataset.range(2**40).map(functools.partial(_numbered, i))
            for i in range(len(rows))
        ]
        steps = grain.MapDataset.mix(counted, [sum(shares(one, source)) for one in of_size])
        return cls(sizes, rows, steps, records, batch_size)

    @property
    def first(self) -> tuple[int, Size]:
        """The first record of the first size that has one, and that size."""
        rows = self.rows[0]
        return (0 if rows is None else int(rows[0])), self.sizes[0]

    def __call__(self, step: int) -> tuple[Size, Callable[[int], int]]:
        """The size of a step, and the record of each of its rows."""
        number, own = (0, step) if self.steps is None else self.steps[step]
        order, rows = self.records[number], self.rows[number]
        first = own * self.batch_size

        def record(row: int) -> int:
            i = order[first + row]
            return int(i if rows is None else rows[i])

        return self.sizes[number], record


def _numbered(number: int, step: int) -> tuple[int, int]:
    return number, step


def shares(some: Source, source: Source) -> list[float]:
    """The weight of `some` of the records of a source; for a mixture, the weight of each part: a
    part with half of its records in `some` has half of its weight."""
    if source.parts is None:
        return [float(len(some))]
    counts, every = (
        np.bincount(source.parts[one.rows], minlength=len(source.weights)) for one in (some, source)
    )
    return [w * float(n) / max(1, m) for w, n, m in zip(source.weights, counts, every, strict=True)]


def _endless(
    source: Source, seed: int, shuffle: bool, weights: Sequence[float]
) -> grain.MapDataset:
    """The record at each position of the endless order. Each part of a mixture has its own order,
    and comes as often as its weight says."""

    def shuffled(rows: grain.MapDataset, seed: int) -> grain.MapDataset:
        order = rows.seed(seed)  # positions past the end are in the next epoch
        return order.shuffle() if shuffle else order

    if source.parts is None:
        return shuffled(grain.MapDataset.range(len(source)), seed)
    own = source.parts[source.rows]
    parts = {part: np.flatnonzero(own == part) for part in range(len(source.weights))}
    parts = {part: rows for part, rows in parts.items() if len(rows)}
    return grain.MapDataset.mix(
        [
            shuffled(grain.MapDataset.source(rows), (seed + part) % 2**32).repeat()
            for part, rows in parts.items()
        ],
        [weights[part] for part in parts],
    )


def nearest_buckets(source: Source, sizes: Sequence[Size]) -> Int[np.ndarray, "n"]:
    """For each record the number of the size with the nearest aspect ratio, in logarithms; 0 if the
    record's own is not known."""
    wanted = np.log([height / width for height, width in sizes])
    nearest = np.zeros(len(source), int)
    for i in range(len(source)):
        try:
            height, width = source.size(i)
        except UserError:
            continue
        nearest[i] = np.abs(wanted - np.log(height / width)).argmin()
    return nearest


class Draw(NamedTuple):
    """What is drawn at random for a position of the order."""

    mirror: bool
    caption: float  # in [0, 1): which of several
    crop: tuple[float, float] | None  # in [0, 1): where between top and bottom, left and right


@dataclass(frozen=True)
class Draws:
    """The `Draw` of a position: a function of it and the seed, the same in a resumed run."""

    seed: int
    flip: bool
    crop: Crop

    def __call__(self, position: int) -> Draw:
        digest = hashlib.blake2b(b"%d %d" % (self.seed, position), digest_size=16).digest()
        mirror, caption, *crop = (x / 2**32 for x in struct.unpack("<4I", digest))
        where = None if self.crop == "center" else tuple(crop)
        return Draw(self.flip and mirror < 0.5, caption, where)
