"""Embeddings of the noise level and the text: vectors and tokens."""

from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from imagen_jax.nn.layers import FourierFeatures, affine_layer_norm, linear
from imagen_jax.sharding import constrain
from imagen_jax.types import LogSNR
from imagen_jax.unet_config import UnetConfig


class TimeEmbedding(nnx.Module):
    """Embeds a log-SNR as a conditioning vector and as tokens."""

    def __init__(self, config: UnetConfig, *, dtype: DTypeLike, rngs: nnx.Rngs):
        features, width = config.learned_sinu_pos_emb_dim, config.time_cond_dim
        self.tokens = config.num_time_tokens
        self.fourier = FourierFeatures(features, rngs=rngs)
        self.to_hiddens = linear(features + 1, width, dtype=dtype, rngs=rngs)
        self.to_cond = linear(width, width, dtype=dtype, rngs=rngs)
        self.to_tokens = linear(width, config.token_dim * self.tokens, dtype=dtype, rngs=rngs)

    def __call__(self, log_snr: LogSNR) -> tuple[Float[Array, "b k"], Float[Array, "b r d"]]:
        hiddens = nnx.silu(self.to_hiddens(self.fourier(log_snr)))
        tokens = constrain(self.to_tokens(hiddens), "b d")
        return constrain(self.to_cond(hiddens), "b d"), tokens.reshape(
            tokens.shape[0], self.tokens, -1
        )


class TextEmbedding(nnx.Module):
    """Embeds the mean of the text tokens as a conditioning vector (`to_text_non_attn_cond`)."""

    def __init__(self, c_in: int, c_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.norm = affine_layer_norm(c_in, dtype=dtype, rngs=rngs)
        self.expand = linear(c_in, c_out, dtype=dtype, rngs=rngs)
        self.project = linear(c_out, c_out, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b d"]) -> Float[Array, "b k"]:
        return constrain(self.project(nnx.silu(self.expand(self.norm(x)))), "b d")
