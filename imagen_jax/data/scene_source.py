"""The scenes as a source of records: `--data scenes`, a million names that nobody needs to keep."""

from collections.abc import Iterator, Sequence
from typing import SupportsIndex

import numpy as np

from imagen_jax.data import scenes
from imagen_jax.data.records import Record, Source
from imagen_jax.data.scenes import LEVELS
from imagen_jax.errors import UserError

TRAINING, HELDOUT = 1_000_000, 1_000  # scenes to train on, and of each held-out level


def scene(number: int) -> scenes.Scene:
    """The scene of a record: to train on, and after these held out, the levels in turn."""
    if number < TRAINING:
        return scenes.training_scene(number)
    seed, level = divmod(number - TRAINING, len(LEVELS))
    return scenes.heldout_scene(LEVELS[level], seed)


def open_scenes(part: str | None = None) -> Source:
    """The scenes as a source: `TRAINING` to train on, and `HELDOUT` of each level; or a part."""
    rows, numbers = np.arange(TRAINING + len(LEVELS) * HELDOUT), None
    if part in LEVELS:
        numbers = rows[TRAINING + LEVELS.index(part) :: len(LEVELS)]
    elif part is not None:
        if part not in ("train", "heldout"):
            known = ", ".join(("train", "heldout", *LEVELS))
            raise UserError(f"scenes:{part}: the parts are {known}")
        numbers = rows[:TRAINING] if part == "train" else rows[TRAINING:]
    return Source(
        name="scenes" if part is None else f"scenes:{part}",
        keys=_Keys(len(rows)),
        read=_Reader(),
        heldout=rows >= TRAINING,
        rows=rows if numbers is None else numbers,
        hashes=rows.astype(np.uint32),
    )


class _Reader:
    def __call__(self, number: int) -> Record:
        one = scene(number)
        return Record(f"scene{number}", one.draw, one.caption)

    def every_caption(self) -> Iterator[tuple[str, ...]]:
        """Every caption that there is: of all contents, in all sizes, places and wordings."""
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
