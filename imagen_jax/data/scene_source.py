"""The scenes as a source of records: `--data scenes`. Keys are computed, not kept in memory."""

from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import numpy as np

from imagen_jax.data import scenes
from imagen_jax.data.records import Record, Source
from imagen_jax.data.scenes import LEVELS
from imagen_jax.errors import UserError

TRAINING, HELDOUT = 1_000_000, 1_000  # scenes to train on, and per held-out level
ALL = TRAINING + len(LEVELS) * HELDOUT
RELATED = {relation.replace(" ", "-"): relation for relation in scenes.RELATIONS}


def scene(number: int) -> scenes.Scene:
    """The scene of a record: first those to train on, then those held out, with the levels in turn,
    then those to train on with two objects, with the relations in turn."""
    if number < TRAINING:
        return scenes.training_scene(number)
    if number < ALL:
        seed, level = divmod(number - TRAINING, len(LEVELS))
        return scenes.heldout_scene(LEVELS[level], seed)
    seed, relation = divmod(number - ALL, len(RELATED))
    return scenes.related_scene(tuple(RELATED.values())[relation], seed)


def open_scenes(part: str | None = None) -> Source:
    """The scenes as a source: `TRAINING` to train on, and `HELDOUT` of each level; or a part.

    The part of a relation, such as `inside`, has `TRAINING` other scenes: a mixture of it and
    `scenes` shows more of what is hard to learn.
    """
    count = ALL + len(RELATED) * TRAINING if part in RELATED else ALL
    rows, numbers = np.arange(count), None
    if part in LEVELS:
        numbers = rows[TRAINING + LEVELS.index(part) :: len(LEVELS)]
    elif part in RELATED:
        numbers = rows[ALL + tuple(RELATED).index(part) :: len(RELATED)]
    elif part is not None:
        if part not in ("train", "heldout"):
            known = ", ".join(("train", "heldout", *LEVELS, *RELATED))
            raise UserError(f"scenes:{part}: no such part; choose one of {known}")
        numbers = rows[:TRAINING] if part == "train" else rows[TRAINING:]
    return Source(
        name="scenes" if part is None else f"scenes:{part}",
        keys=_Keys(count),
        read=_Reader(),
        heldout=(rows >= TRAINING) & (rows < ALL),
        rows=rows if numbers is None else numbers,
        hashes=rows.astype(np.uint32),
    )


class _Reader:
    def __call__(self, number: int) -> Record:
        one = scene(number)
        return Record(f"scene{number}", one.draw, one.caption)

    def every_caption(self) -> Iterator[tuple[str, ...]]:
        """Every possible caption: of all contents, in all sizes, places and wordings."""
        for level in (None, *LEVELS):
            for content in scenes.contents(level):
                for sized in scenes.every_size(content):
                    yield scenes.wordings(sized)


class _Keys(Sequence):
    """`scene0`, `scene1`, ..."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: SupportsIndex) -> str:
        return f"scene{number}"

    def __iter__(self) -> Iterator[str]:
        return (self[number] for number in range(self.count))
