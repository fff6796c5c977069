"""Captioned images, from where they are stored to NumPy batches. No networks, no JAX arrays.

    source = open_source("bundled", split="train")           # sources.py: what --data accepts
    batches = make_batches(source, image_size=64, batch_size=32, seed=0, tokenize=tokenize)
    batch = next(batches)                                     # {"images": uint8, "tokens": int32}

The batch of a step is a function of the step: `start_step` resumes anywhere. records.py defines a
source; readers.py reads folders and tensorflow-datasets, shards.py tar shards, tables.py,
array_records.py and hugging_face.py what their names say; kinds.py sorts files by their names,
written.py reads text; choosing.py makes captions from a template, filters and mixes; images.py
decodes, pipeline.py makes batches, embeddings.py stores encoded captions (`python -m
imagen_jax.data.embed`), grid.py draws labelled grids, and `python -m imagen_jax.data.inspect` shows
what is in a source.
"""

from imagen_jax.data.embeddings import Embeddings
from imagen_jax.data.grid import labelled_grid
from imagen_jax.data.images import TooSmall, check, decode, read
from imagen_jax.data.pipeline import Batches, make_batches, pad_embeds
from imagen_jax.data.records import Record, Source
from imagen_jax.data.sources import NEW_COMBINATIONS, Opening, demo_captions, open_source
from imagen_jax.data.written import is_unicode, read_lines, shown

__all__ = [
    "NEW_COMBINATIONS",
    "Batches",
    "Embeddings",
    "Opening",
    "Record",
    "Source",
    "TooSmall",
    "check",
    "decode",
    "demo_captions",
    "is_unicode",
    "labelled_grid",
    "make_batches",
    "open_source",
    "pad_embeds",
    "read",
    "read_lines",
    "shown",
]
