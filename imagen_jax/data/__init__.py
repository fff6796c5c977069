"""Captioned images, from where they are stored to NumPy batches. No networks, no JAX arrays.

    source = open_source("bundled", split="train")           # sources.py: what --data accepts
    batches = make_batches(source, image_size=64, batch_size=32, seed=0, tokenize=tokenize)
    batch = next(batches)                                     # {"images": uint8, "tokens": int32}

The batch of a step is a function of the step: `start_step` resumes anywhere. records.py defines a
source; readers.py reads folders and tensorflow-datasets, shards.py tar shards, by what kinds.py
says of names and written.py of text; images.py decodes, pipeline.py makes batches, grid.py draws
labelled grids of images.
"""

from imagen_jax.data.grid import labelled_grid
from imagen_jax.data.images import TooSmall, check, decode, read
from imagen_jax.data.pipeline import Batches, check_caption, make_batches, pad_embeds
from imagen_jax.data.records import Record, Source
from imagen_jax.data.sources import NEW_COMBINATIONS, demo_captions, open_source
from imagen_jax.data.written import is_unicode, read_lines, shown

__all__ = [
    "NEW_COMBINATIONS",
    "Batches",
    "Record",
    "Source",
    "TooSmall",
    "check",
    "check_caption",
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
