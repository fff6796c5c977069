"""`TextEncoder`: a tokenizer and a frozen T5 in one value, from a folder, a name, or `demo`.

No pretrained T5 is small enough to ship, so `demo` is a small T5 v1.1 with weights drawn from a
fixed seed. It knows no language. But it maps different captions to clearly different embeddings,
always the same, which is enough for a network to learn what each caption it was shown means.
"""

import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from jaxtyping import Int32
from tokenizers import Tokenizer

from imagen_jax.config import T5_WIDTHS
from imagen_jax.errors import UserError
from imagen_jax.sharding import Layout
from imagen_jax.text import loading, tokenizer
from imagen_jax.text.t5 import T5Config, abstract_encoder, encode
from imagen_jax.types import Params, TextEmbeds, TextMask

DEMO = "demo"
DEMO_CONFIG = T5Config(
    d_model=T5_WIDTHS[DEMO],
    d_kv=32,
    d_ff=256,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
)
_DEMO_SEED = 5

_encode = jax.jit(encode, static_argnames="config")


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """What text becomes embeddings with. `params` is a pure dict for `encode`."""

    name: str
    config: T5Config
    params: Params
    tokenizer: Tokenizer

    @property
    def width(self) -> int:
        """Width of the embeddings, the cascade's `text_embed_dim`."""
        return self.config.d_model

    @property
    def is_demo(self) -> bool:
        """Whether the weights are random: a command must say so."""
        return self.name == DEMO

    def tokenize(
        self, texts: Sequence[str], max_length: int = tokenizer.MAX_LENGTH
    ) -> Int32[np.ndarray, "b {max_length}"]:
        """See `imagen_jax.text.tokenize`."""
        return tokenizer.tokenize(self.tokenizer, texts, max_length=max_length)

    def __call__(
        self, texts: Sequence[str], max_length: int = tokenizer.MAX_LENGTH
    ) -> tuple[TextEmbeds, TextMask]:
        """Embeddings and mask of captions; compiled once per number and length of them."""
        return _encode(self.params, self.config, self.tokenize(texts, max_length))


def load_encoder(
    name_or_folder: str | Path, *, dtype: DTypeLike = jnp.float32, layout: Layout | None = None
) -> TextEncoder:
    """`demo`, a Hugging Face folder with a T5 (full or encoder), or such a model's name.

    `dtype` is what the weights are kept and computed in; embeddings come as float32 all the same.
    With a `layout` the weights are split over its mesh: no device ever holds all of them.
    Raises ValueError with one line for whatever is missing or does not fit.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise UserError(f"dtype = {dtype} is none of float32, bfloat16, float16.")
    if str(name_or_folder) == DEMO:
        return TextEncoder(
            name=DEMO,
            config=DEMO_CONFIG,
            params=_demo_params(dtype, layout),
            tokenizer=tokenizer.load_tokenizer(),
        )
    folder = loading.find_folder(name_or_folder)
    config = loading.read_config(folder)
    pieces = tokenizer.load_tokenizer(folder)
    # A larger id would be clamped by the look-up on the device, without an error.
    if pieces.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {pieces.get_vocab_size()} pieces, the table of the model "
            f"vocab_size = {config.vocab_size}."
        )
    params = loading.load_params(folder, config, dtype=dtype, layout=layout)
    return TextEncoder(name=str(name_or_folder), config=config, params=params, tokenizer=pieces)


def _demo_params(dtype: DTypeLike, layout: Layout | None) -> Params:
    """Drawn by numpy's PCG64, in sorted order of the names: the same on every version of JAX.

    Standard deviations are 1 / sqrt(fan-in) as in T5, so that each branch adds at most about as
    much as the token's own vector. The position bias is wider, so that the order of words counts.
    """
    rng = np.random.Generator(np.random.PCG64(_DEMO_SEED))
    shapes = traverse_util.flatten_dict(abstract_encoder(DEMO_CONFIG)[1])
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    params = {}
    for path in sorted(shapes, key=lambda path: tuple(map(str, path))):
        shape = shapes[path].shape
        if path[-1] == "scale":
            value = np.ones(shape, np.float32)
        elif path[-1] == "kernel":
            # Without T5's scaling of logits, queries must be smaller by sqrt(d_kv).
            fan_in = shape[0] * (DEMO_CONFIG.d_kv if path[-2] == "q" else 1)
            value = draw(shape) / np.float32(fan_in**0.5)
        else:
            value = draw(shape)
        value = value.astype(loading.stored_dtype(path, dtype))
        params[path] = jnp.asarray(value) if layout is None else layout.put(path, value)
    return traverse_util.unflatten_dict(params)
