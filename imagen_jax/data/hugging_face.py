"""Datasets of the Hugging Face library, as a `Source`: `hf:NAME[:SPLIT]`, where NAME is a dataset
on the hub or a folder, of files or written by `save_to_disk`."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from imagen_jax.data.readers import found_captions, make_source, read_beside
from imagen_jax.data.records import Record, Source, Strings, required
from imagen_jax.data.tables import IMAGE_KEYS
from imagen_jax.errors import UserError, first_line

HELDOUT = ("heldout", "validation")  # the first of these that exists is held out


def dataset(
    name: str,
    split: str | None,
    *,
    heldout_fraction: float,
    image_key: str | None = None,
    caption_key: str | None = None,
) -> Source:
    """The images of one split of a dataset, or of its "train" split with its "heldout" or
    "validation" split (if it has one) held out. Keys are SPLIT/ROW. Raises UserError if the dataset
    does not exist, or has no column of images."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"hf:{name} needs: pip install -e '.[hf]'") from error
    try:
        saved = any(
            os.path.exists(os.path.join(name, file)) for file in ("dataset_dict.json", "state.json")
        )
        found = datasets.load_from_disk(name) if saved else datasets.load_dataset(name)
    except Exception as error:  # a dozen types, network errors among them
        raise UserError(f"hf:{name}: {type(error).__name__}: {first_line(error)}") from error
    parts = dict(found) if isinstance(found, dict) else {split or "train": found}
    main = split or ("train" if "train" in parts else next(iter(parts)))
    if main not in parts:
        raise UserError(f"hf:{name}: no split {main!r}; it has {', '.join(parts)}")
    apart = None if split else next((s for s in HELDOUT if s in parts and s != main), None)
    chosen = {s: parts[s] for s in (main, apart) if s is not None}
    features = parts[main].features
    key = image_key or next((k for k, f in features.items() if isinstance(f, datasets.Image)), None)
    key = key or next((k for k in IMAGE_KEYS if k in features), None)
    for column in (key, caption_key):
        if column is not None and column not in features:
            raise UserError(f"hf:{name}: no column {column!r}; it has {', '.join(features)}")
    if key is None:
        raise UserError(f"hf:{name}: no column of images; it has {', '.join(features)}")
    if isinstance(features[key], datasets.Image):
        stored = datasets.Image(decode=False)
        chosen = {s: part.cast_column(key, stored) for s, part in chosen.items()}
    labels = {k: tuple(f.names) for k, f in features.items() if isinstance(f, datasets.ClassLabel)}
    keys = Strings.of(f"{s}/{i}" for s, part in chosen.items() for i in range(len(part)))
    read = _Reader(tuple(chosen.values()), keys, key, caption_key, labels)
    source = make_source(f"hf:{name}", keys, read, heldout_fraction)
    if len(chosen) == 1:
        return source
    return replace(source, heldout=np.arange(len(keys)) >= len(chosen[main]))


@dataclass(frozen=True)
class _Reader:
    parts: tuple[Any, ...]
    keys: Sequence[str]
    image_key: str
    caption_key: str | None
    labels: Mapping[str, tuple[str, ...]]

    def __call__(self, i: int) -> Record:
        row = self._row(i)
        image = row[self.image_key]
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            image = read_beside("", image)
        if image is None:
            raise UserError("no image")
        return Record.of(self.keys[i], image, found_captions(row, self.caption_key))

    def captions(self, i: int) -> tuple[str, ...]:
        return required(found_captions(self._row(i, text_only=True), self.caption_key))

    def columns(self, i: int) -> Mapping[str, Any]:
        """The other columns; class labels as their names."""
        row = self._row(i, text_only=True)
        names = {k: n[row[k]] for k, n in self.labels.items() if row[k] is not None and row[k] >= 0}
        return row | names

    def _row(self, i: int, text_only: bool = False) -> dict[str, Any]:
        for part in self.parts:
            if i < len(part):
                return (part.remove_columns(self.image_key) if text_only else part)[i]
            i -= len(part)
        raise IndexError(i)
