"""Captioned images, from where they are stored to NumPy batches. No networks, no JAX arrays.

    source = open_source("bundled", split="train")           # sources.py: what --data accepts
    batches = make_batches(source, image_size=64, batch_size=32, seed=0, tokenize=tokenize)
    batch = next(batches)                                     # {"images": uint8, "tokens": int32}
    batches.position                                          # one integer: start_step to resume at

records.py defines a source, readers.py reads folders, tar shards and tensorflow-datasets,
images.py decodes, pipeline.py makes batches, grid.py draws labelled grids of pictures.
"""

from imagen_jax.data.grid import labelled_grid
from imagen_jax.data.images import decode, to_pil, to_uint8
from imagen_jax.data.pipeline import Batches, make_batches, pad_embeds
from imagen_jax.data.records import Record, Source
from imagen_jax.data.sources import NEW_COMBINATIONS, demo_captions, open_source

__all__ = [
    "NEW_COMBINATIONS",
    "Batches",
    "Record",
    "Source",
    "decode",
    "demo_captions",
    "labelled_grid",
    "make_batches",
    "open_source",
    "pad_embeds",
    "to_pil",
    "to_uint8",
]
