"""The encoder half of T5 (Raffel et al., 2020), v1.0 and v1.1, frozen: no dropout, no cache.

    x <- x + Attention(norm(x))          norm(x) = scale · x / rms(x)
    x <- x + FeedForward(norm(x))        FeedForward = relu(x W) Wo, or gelu(x W0) · (x W1) Wo

T5 departs from the usual transformer in three ways: logits are not divided by sqrt(d_kv), positions
enter only as a bias per (bucketed distance, head), shared by all layers, and apart from matrices
the only parameters are the norms' scales. The residual stream, norms and softmax are float32
whatever the compute dtype: activations of the large models reach thousands, where bfloat16 no
longer resolves units and float16 overflows.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from imagen_jax.errors import UserError
from imagen_jax.nn.attend import attend
from imagen_jax.sharding import constrain, splits
from imagen_jax.streams import ParamKeys
from imagen_jax.types import Params, TextEmbeds, TextMask

FEED_FORWARDS = ("relu", "gated-gelu")


@dataclasses.dataclass(frozen=True, kw_only=True)
class T5Config:
    """The fields of Hugging Face's `config.json` that shape the encoder, with their defaults.

    `feed_forward_proj` is `relu` in T5 v1.0 and `gated-gelu` (tanh approximation) in v1.1.
    """

    vocab_size: int = 32128
    d_model: int = 512
    d_kv: int = 64
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    feed_forward_proj: str = "relu"
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is int and (type(value) is not int or value < 1):
                raise UserError(f"T5Config.{field.name} = {value!r} must be a positive integer.")
        if self.feed_forward_proj not in FEED_FORWARDS:
            raise UserError(
                f"T5Config.feed_forward_proj = {self.feed_forward_proj!r} is not one of "
                f"{', '.join(map(repr, FEED_FORWARDS))}."
            )
        buckets = self.relative_attention_num_buckets
        distance = self.relative_attention_max_distance
        if buckets < 4 or buckets % 2 or distance <= buckets // 4:
            raise UserError(
                f"T5Config.relative_attention_num_buckets = {buckets} must be even, at least 4, "
                f"and its quarter below relative_attention_max_distance = {distance}."
            )

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "T5Config":
        """From a parsed `config.json`; fields for the decoder or training are ignored."""
        kind = data.get("model_type", "t5")
        if kind not in ("t5", "mt5"):
            raise UserError(f"model_type = {kind!r} is not a T5 (one of 't5', 'mt5').")
        names = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: data[name] for name in names if name in data})


def relative_position_buckets(
    length: int, *, num_buckets: int, max_distance: int
) -> Int[np.ndarray, "l l"]:
    """Bucket of the distance from query (row) to key (column), in 0 .. num_buckets - 1.

    Half of the buckets are for keys ahead. Of each half, half is for exact distances, the rest
    grows logarithmically up to `max_distance`, and everything farther shares the last bucket
    (transformers' `T5Attention._relative_position_bucket`, bidirectional). Plain numpy, in float32
    as there: the table is a constant of the compiled program.
    """
    half = num_buckets // 2
    exact = half // 2
    position = np.arange(length, dtype=np.int32)
    offset = position[None, :] - position[:, None]
    distance = np.abs(offset)
    ratio = np.maximum(distance, exact).astype(np.float32) / np.float32(exact)
    log = np.log(ratio) / np.float32(math.log(max_distance / exact)) * np.float32(half - exact)
    far = np.minimum(exact + log.astype(np.int32), half - 1)
    return np.where(offset > 0, half, 0) + np.where(distance < exact, distance, far)


class Norm(nnx.Module):
    """Root-mean-square norm, in float32 up to the last cast."""

    def __init__(self, width: int, *, epsilon: float, dtype: DTypeLike):
        self.scale = nnx.Param(jnp.ones(width))
        self.epsilon = epsilon
        self.dtype = dtype

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        x = x.astype(jnp.float32)
        x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + self.epsilon)
        return (x * self.scale[...].astype(jnp.float32)).astype(self.dtype)


class Attention(nnx.Module):
    """Multi-head self-attention without scaling; returns float32 for the residual stream."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        inner = config.num_heads * config.d_kv
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, rngs=rngs)
        self.q = linear(config.d_model, inner)
        self.k = linear(config.d_model, inner)
        self.v = linear(config.d_model, inner)
        self.o = linear(inner, config.d_model, preferred_element_type=jnp.float32)
        self.heads = config.num_heads

    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "#b n l l"]
    ) -> Float[Array, "b l d"]:
        heads = (*x.shape[:2], self.heads, -1)
        axes = "b l c" if splits(self.heads) else "b l _"
        q, k, v = (
            constrain(constrain(project(x), axes).reshape(heads), "b l n k")
            for project in (self.q, self.k, self.v)
        )
        return constrain(self.o(attend(q, k, v, scale=1.0, bias=bias)), "b l d")


class FeedForward(nnx.Module):
    """relu(x wi) wo, or gelu(x wi_0) · (x wi_1) wo; returns float32 for the residual stream.

    In float16 `wo` runs in float32, as in transformers: its sums overflow in the large models.
    """

    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.gated = config.feed_forward_proj == "gated-gelu"
        if self.gated:
            self.wi_0 = linear(config.d_model, config.d_ff, dtype=dtype)
            self.wi_1 = linear(config.d_model, config.d_ff, dtype=dtype)
        else:
            self.wi = linear(config.d_model, config.d_ff, dtype=dtype)
        self.wo = linear(
            config.d_ff,
            config.d_model,
            dtype=jnp.float32 if dtype == jnp.float16 else dtype,
            preferred_element_type=jnp.float32,
        )

    def __call__(self, x: Float[Array, "b l d"]) -> Float[Array, "b l d"]:
        if self.gated:
            hidden = nnx.gelu(self.wi_0(x), approximate=True) * self.wi_1(x)
        else:
            hidden = nnx.relu(self.wi(x))
        return constrain(self.wo(constrain(hidden, "b l c")), "b l d")


class Block(nnx.Module):
    def __init__(self, config: T5Config, *, dtype: DTypeLike, rngs: nnx.Rngs):
        norm = functools.partial(Norm, config.d_model, epsilon=config.layer_norm_epsilon)
        self.attention_norm = norm(dtype=dtype)
        self.attention = Attention(config, dtype=dtype, rngs=rngs)
        self.feed_forward_norm = norm(dtype=dtype)
        self.feed_forward = FeedForward(config, dtype=dtype, rngs=rngs)

    def __call__(
        self, x: Float[Array, "b l d"], bias: Float[Array, "#b n l l"]
    ) -> Float[Array, "b l d"]:
        x = x + self.attention(self.attention_norm(x), bias)
        return x + self.feed_forward(self.feed_forward_norm(x))


class T5Encoder(nnx.Module):
    """Tokens to the last hidden state, float32, at every position (padding included)."""

    def __init__(self, config: T5Config, *, dtype: DTypeLike = jnp.float32, rngs: nnx.Rngs):
        normal = nnx.initializers.normal(1.0)
        self.embedding = nnx.Param(normal(rngs.params(), (config.vocab_size, config.d_model)))
        buckets = config.relative_attention_num_buckets
        self.position_bias = nnx.Param(normal(rngs.params(), (buckets, config.num_heads)))
        self.blocks = nnx.List(
            [Block(config, dtype=dtype, rngs=rngs) for _ in range(config.num_layers)]
        )
        # The caller gets float32, which costs little: one (l, d) matrix per caption.
        self.norm = Norm(config.d_model, epsilon=config.layer_norm_epsilon, dtype=jnp.float32)
        self.config = config

    def __call__(
        self, tokens: Int[Array | np.ndarray, "b l"], mask: Bool[Array, "b l"]
    ) -> Float[Array, "b l d"]:
        buckets = relative_position_buckets(
            tokens.shape[1],
            num_buckets=self.config.relative_attention_num_buckets,
            max_distance=self.config.relative_attention_max_distance,
        )
        bias = self.position_bias[...].astype(jnp.float32)[buckets].transpose(2, 0, 1)
        bias = jnp.where(mask[:, None, None, :], bias, jnp.finfo(jnp.float32).min)
        x = constrain(self.embedding[...][tokens].astype(jnp.float32), "b l d")
        for block in self.blocks:
            x = block(x, bias)
        return self.norm(x)


@functools.cache
def abstract_encoder(
    config: T5Config, dtype: DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef, Params]:
    """The module's definition and its parameters as float32 shapes, nothing allocated."""
    module = nnx.eval_shape(
        lambda: T5Encoder(config, dtype=dtype, rngs=ParamKeys(jax.random.key(0)))
    )
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def encode(
    params: Params,
    config: T5Config,
    tokens: Int[Array | np.ndarray, "b l"],
    *,
    keeps_padding: bool = False,
) -> tuple[TextEmbeds, TextMask]:
    """Embeddings, float32 and zero where the tokens are padding (0), and the mask of real tokens.

    With `keeps_padding` the encoder's output is kept there (it attends only to the real tokens).

    Computes in the dtype that the parameters were loaded in. Jit with `config` static. As in the
    reference's `t5_encode_tokenized_text`.
    """
    graphdef, _ = abstract_encoder(config, params["embedding"].dtype)
    mask = jnp.asarray(tokens) != 0
    embeds = nnx.merge(graphdef, params)(tokens, mask)
    if not keeps_padding:
        embeds = jnp.where(mask[:, :, None], embeds, 0)
    return constrain(embeds, "b l d"), mask
