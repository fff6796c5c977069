"""Captions in, embeddings out: the T5 tokenizer and a frozen T5 encoder (Raffel et al., 2020).

`load_encoder("demo")` needs no files; `load_encoder(FOLDER_OR_NAME)` reads a Hugging Face folder.
"""

from imagen_jax.text.encoder import TextEncoder, load_encoder
from imagen_jax.text.t5 import T5Config, encode
from imagen_jax.text.tokenizer import load_tokenizer, tokenize

__all__ = ["T5Config", "TextEncoder", "encode", "load_encoder", "load_tokenizer", "tokenize"]
