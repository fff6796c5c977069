"""Captions in, embeddings out: the T5 tokenizer and a frozen T5 encoder (Raffel et al., 2020).

    encoder = load_encoder("demo")               # needs no files; a Hugging Face folder or name
    encoder = cascade_encoder(config)            # that of a cascade, with its width checked
    embeds, mask = encoder(captions, length=config.text_len)

All captions become embeddings through `TextEncoder`, in training, sampling and the library: encoded
at 256 tokens, then cut. `Identity` is what runs and stored embeddings record about an encoder.
"""

from imagen_jax.text.encoder import (
    DEMO_NOTE,
    TextEncoder,
    cascade_encoder,
    empty_text,
    encode_or_absent,
    load_encoder,
    save_encoder,
    stored_encoder,
    with_params,
)
from imagen_jax.text.identity import Identity, read_beside
from imagen_jax.text.t5 import T5Config, encode
from imagen_jax.text.tokenizer import columns, load_tokenizer, tokenize, trim, valid

__all__ = [
    "DEMO_NOTE",
    "Identity",
    "T5Config",
    "TextEncoder",
    "cascade_encoder",
    "columns",
    "empty_text",
    "encode",
    "encode_or_absent",
    "load_encoder",
    "load_tokenizer",
    "read_beside",
    "save_encoder",
    "stored_encoder",
    "tokenize",
    "trim",
    "valid",
    "with_params",
]
