"""`TextEncoder`: a tokenizer and a frozen T5 in one value, from a folder, a name, or `demo`.

No pretrained T5 is small enough to ship, so `demo` is a small T5 v1.1 with weights drawn from a
fixed seed. It knows no language, but it maps different captions to clearly different embeddings,
always the same, which is enough for a network to learn what each of its training captions means.
"""

import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.sharding import NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int32
from tokenizers import Tokenizer

from imagen_jax import memory
from imagen_jax.config import T5_WIDTHS, ImagenConfig
from imagen_jax.errors import UserError
from imagen_jax.sharding import Layout
from imagen_jax.text import cleaning, identity, loading, tokenizer
from imagen_jax.text.identity import Identity, read_beside
from imagen_jax.text.t5 import T5Config, abstract_encoder, encode
from imagen_jax.types import AnyArray, Params, TextEmbeds, TextMask
from imagen_jax.unet_config import TEXT_LENGTH

DEMO = "demo"
DEMO_CONFIG = T5Config(
    d_model=T5_WIDTHS[DEMO],
    d_kv=32,
    d_ff=256,
    num_layers=2,
    num_heads=4,
    feed_forward_proj="gated-gelu",
)
DEMO_NOTE = (
    "text: the demo encoder, a small T5 with random frozen weights. It can distinguish "
    "captions but understands no language: a cascade knows only those it was trained on."
)
_DEMO_SEED = 5


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TextEncoder:
    """A tokenizer and a frozen T5 encoder: the only way from captions to embeddings.

    Captions are encoded at 256 tokens, as in the reference, and the embeddings are cut to what is
    read. (T5 is bidirectional: encoding fewer tokens gives other embeddings.) `params` is a pure
    dict for `encode`, in the dtype that the encoder computes in, placed by `layout`. With
    `keeps_padding` captions are cut to the length that is read, keeping the end token, and encoded
    at that length; embeddings of padded positions are kept: networks such as DeepFloyd IF's attend
    to them.
    """

    name: str
    config: T5Config
    params: Params = dataclasses.field(repr=False)
    tokenizer: Tokenizer = dataclasses.field(repr=False)
    sha256: str
    layout: Layout | None = None
    keeps_padding: bool = False
    cleans: bool = False
    """Whether captions are cleaned first, as for DeepFloyd IF (`cleaning`)."""

    @property
    def width(self) -> int:
        """Width of the embeddings, the cascade's `text_embed_dim`."""
        return self.config.d_model

    @property
    def is_demo(self) -> bool:
        """Whether the weights are random, which a command must print."""
        return self.name == DEMO

    @property
    def identity(self) -> Identity:
        """What a run and stored embeddings record about it."""
        return Identity(name=self.name, sha256=self.sha256)

    @property
    def dtype(self) -> np.dtype:
        """The compute dtype; embeddings are always float32."""
        return self.params["embedding"].dtype

    def tokenize(self, captions: Sequence[str]) -> Int32[np.ndarray, "b 256"]:
        """See `imagen_jax.text.tokenize`. No device is used."""
        if self.cleans and not isinstance(captions, str):
            captions = [cleaning.clean(caption) for caption in captions]
        return tokenizer.tokenize(self.tokenizer, captions, blank=self.keeps_padding)

    def left_out(self, caption: str, length: int) -> str:
        """The end of a caption that is not read at `length` tokens; empty if all of it is read."""
        if self.cleans:
            caption = cleaning.clean(caption)
        encoded = self.tokenizer.encode(tokenizer.valid(caption))
        # At 256 tokens, or if padding is kept, the last one is the end token.
        read = length - 1 if self.keeps_padding else min(length, TEXT_LENGTH - 1)
        if len(encoded.ids) - 1 <= read:
            return ""
        return caption[encoded.offsets[read][0] :].strip()

    def embed(
        self, tokens: Int32[AnyArray, "b l2"], *, length: int = TEXT_LENGTH
    ) -> tuple[TextEmbeds, TextMask]:
        """Embeddings (b, length, d) and mask of tokens (`tokenize`), on the device.

        The embeddings are cut to `length`, or padded with zeros. Compiled once for each shape of
        `tokens`, so `trim` them; with several processes, trim all rows to the `columns` that the
        longest needs.
        """
        rows = None if self.layout is None else self.layout.rows(len(tokens))
        compiled = _embed(self.config, length, self.layout, rows, self.keeps_padding)
        return compiled(memory.to_device(self.params), tokens)

    def __call__(
        self, captions: Sequence[str], *, length: int = TEXT_LENGTH
    ) -> tuple[TextEmbeds, TextMask]:
        """Embeddings, float32 (b, length, d), and mask of captions, on the host.

        Raises UserError for an empty caption, and for embeddings that are not finite.
        """
        tokens = tokenizer.trim(self.tokenize(captions))
        fetch = jax.device_get if self.layout is None else self.layout.fetch
        embeds, mask = fetch(self.embed(tokens, length=length))
        for caption, finite in zip(captions, np.isfinite(embeds).all((1, 2)), strict=True):
            if not finite:
                raise UserError(
                    f"text encoder {self.name!r}: the embedding of {caption[:60]!r} is not finite "
                    f"in {self.dtype}."
                )
        return embeds, mask


def encode_or_absent(
    encode: Callable[[list[str]], tuple[TextEmbeds, TextMask]],
    texts: Sequence[str],
    *,
    blank: bool = False,
) -> tuple[TextEmbeds, TextMask]:
    """Embeddings and masks of texts by `encode`; a blank text is absent: its mask is all False.

    With `blank` it is encoded like any other (`ImagenConfig.encodes_blank_text`).
    """
    if blank or isinstance(texts, str):  # `encode` rejects a single string
        return encode(texts)
    absent = np.array([not text.strip() for text in texts])
    embeds, masks = encode(
        ["-" if blank else text for blank, text in zip(absent, texts, strict=True)]
    )
    return embeds, masks & ~absent[:, None]


@functools.lru_cache(maxsize=4)
def empty_text(
    encoder: TextEncoder, count: int, length: int, layout: Layout
) -> Float[Array, "b l d"]:
    """The embeddings of the empty text as `count` rows of a batch, for dropped texts if
    `ImagenConfig.encodes_blank_text`. Encoded once."""
    one, _ = encoder([""], length=length)
    rows = len(layout.own_rows(count))
    return layout.to_batch(np.broadcast_to(one, (rows, *one.shape[1:])), count)


@functools.lru_cache(maxsize=8)
def _embed(
    config: T5Config,
    length: int,
    layout: Layout | None,
    rows: NamedSharding | None,
    keeps_padding: bool = False,
) -> Callable[[Params, AnyArray], tuple[TextEmbeds, TextMask]]:
    def embed(params: Params, tokens: AnyArray) -> tuple[TextEmbeds, TextMask]:
        if keeps_padding:
            return encode(params, config, tokenizer.fitted(tokens, length), keeps_padding=True)
        embeds, mask = (x[:, :length] for x in encode(params, config, tokens))
        missing = (0, length - mask.shape[1])
        return jnp.pad(embeds, ((0, 0), missing, (0, 0))), jnp.pad(mask, ((0, 0), missing))

    if layout is None:
        return jax.jit(embed)
    return jax.jit(layout.on_mesh(embed), out_shardings=rows)


def cascade_encoder(
    config: ImagenConfig,
    *,
    name: str | None = None,
    dtype: DTypeLike = jnp.float32,
    layout: Layout | None = None,
    recorded: Identity | None = None,
) -> TextEncoder:
    """The text encoder of a cascade, as `load_encoder` reads it.

    `name` replaces `text_encoder_name` as the place to find it. `recorded` is the encoder that the
    cascade was trained with, if known. Raises UserError for another one, or one with another width.
    """
    name = name or config.text_encoder_name
    encoder = load_encoder(name, dtype=dtype, layout=layout)
    encoder = dataclasses.replace(
        encoder, keeps_padding=config.reads_padding, cleans=config.encodes_blank_text
    )
    if encoder.width != config.text_embed_dim:
        raise UserError(
            f"{encoder.name} has embeddings of width {encoder.width}, the cascade text_embed_dim = "
            f"{config.text_embed_dim}."
        )
    encoder.identity.check(recorded, "this cascade")
    return encoder


def stored_encoder(
    config: ImagenConfig, source: str, folders: Iterable[str | os.PathLike]
) -> Identity | None:
    """The encoder of the embeddings that a dataset stores (`read_beside`), for a cascade that reads
    them instead of captions.

    Raises UserError if the cascade replaces dropped text by the empty text's embedding, which no
    such dataset has.
    """
    if config.encodes_blank_text and config.cond_drop_prob > 0:
        raise UserError(
            f"{source} contains embeddings: dropping text (cond_drop_prob) in this cascade also "
            "needs that of the empty text. Use captions, or a cascade with cond_drop_prob = 0."
        )
    return read_beside(folders)


def load_encoder(
    name_or_folder: str | Path, *, dtype: DTypeLike = jnp.float32, layout: Layout | None = None
) -> TextEncoder:
    """Loads `demo`, a Hugging Face folder with a T5 (full or encoder), or such a model by name.

    A name is looked up in the hub's local cache and downloaded if it is not there; T5-XXL's encoder
    is 19 GB in float32. `dtype` (float32, bfloat16, float16) is that of the weights and the
    computation; embeddings are always float32. With a `layout` the weights are split over its mesh:
    no device ever holds all of them. Raises UserError with one line for whatever is missing, does
    not fit, or is not finite.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in (jnp.float32, jnp.bfloat16, jnp.float16):
        raise UserError(f"dtype = {dtype} is not one of float32, bfloat16, float16.")
    if str(name_or_folder) == DEMO:
        params, sha256 = _demo_params(dtype, layout)
        return TextEncoder(
            name=DEMO,
            config=DEMO_CONFIG,
            params=params,
            tokenizer=tokenizer.load_tokenizer(),
            sha256=sha256,
            layout=layout,
        )
    folder = loading.find_folder(name_or_folder)
    config = loading.read_config(folder)
    pieces = tokenizer.load_tokenizer(folder)
    # A larger id would be clamped by the look-up on the device, without an error.
    if pieces.get_vocab_size() > config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {pieces.get_vocab_size()} pieces, but the model has "
            f"vocab_size = {config.vocab_size}."
        )
    params, sha256 = loading.load_params(folder, config, dtype=dtype, layout=layout)
    return TextEncoder(
        name=str(name_or_folder),
        config=config,
        params=params,
        tokenizer=pieces,
        sha256=sha256,
        layout=layout,
    )


def with_params(encoder: TextEncoder, params: Params, name: str = "trained") -> TextEncoder:
    """The encoder with other weights, in float32."""
    flat = traverse_util.flatten_dict(params)
    digests = {path: identity.digest(np.asarray(value)) for path, value in flat.items()}
    if None in digests.values():
        raise UserError(f"text encoder {name!r}: its weights are not finite.")
    sha256 = identity.weights_hash(digests)
    return dataclasses.replace(encoder, name=name, params=params, sha256=sha256)


def save_encoder(encoder: TextEncoder, folder: str | Path) -> None:
    """Writes the folder of a Hugging Face T5 encoder with its tokenizer, for `load_encoder`."""
    folder = Path(folder)
    loading.save_params(folder, encoder.config, encoder.params)
    encoder.tokenizer.save(str(folder / "tokenizer.json"))


def _demo_params(dtype: DTypeLike, layout: Layout | None) -> tuple[Params, str]:
    """Drawn by numpy's PCG64, in sorted order of the names: the same on every version of JAX.

    Standard deviations are 1 / sqrt(fan-in) as in T5, so that each branch adds at most about as
    much as the token's own vector. The position bias is wider, so that the order of words counts.
    """
    rng = np.random.Generator(np.random.PCG64(_DEMO_SEED))
    shapes = traverse_util.flatten_dict(abstract_encoder(DEMO_CONFIG)[1])
    draw = functools.partial(rng.standard_normal, dtype=np.float32)
    params, digests = {}, {}
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
        digests[path] = identity.digest(value)
        value = value.astype(loading.stored_dtype(path, dtype))
        params[path] = jnp.asarray(value) if layout is None else layout.put(path, value)
    return traverse_util.unflatten_dict(params), identity.weights_hash(digests)
