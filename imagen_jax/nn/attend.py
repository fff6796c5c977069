"""Softmax attention, in the form that suits the device it is traced for.

    plain   two XLA products, with the float32 logits between them in memory: everywhere
    cudnn   cuDNN's fused attention: NVIDIA from Ampere on, bfloat16 and float16
    splash  Pallas' splash attention: TPUs, bfloat16, one key head

The fused forms never write the logits: b * n * p * m float32s, 0.5 GB for one 64 x 64 feature map
with 8 heads. They are used from FUSED_FROM queries and keys up; below that, logits are not much
larger than the queries. They do not support an additive float32 bias, which T5 has.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from imagen_jax.sharding import constrain, per_device, platform, splits

SCALE = 8.0
"""The factor of the U-Net's logits, whose queries and keys have unit length."""

FUSED_FROM = 256
LANES = 128  # of a TPU: block sizes are multiples of it

Queries = Float[Array, "b p n k"]
KeysOrValues = Float[Array, "b m n2 k"]


def attend(
    q: Queries,
    k: KeysOrValues,
    v: KeysOrValues,
    *,
    scale: float,
    bias: Float[Array, "#b n p m"] | None = None,
    h: int | None = None,
) -> Float[Array, "b p nk"]:
    """softmax(scale q k^T + bias) v with heads merged; all query heads may share one key head.

    The queries are pixels of `h` rows, or tokens (None). Every form computes softmax in float32.
    """
    b, p, n, _ = q.shape
    rows = "b m" if h is None else "b p"
    fused = None if bias is not None else _fused(q, k)
    if fused is not None:
        axes = (f"{rows} n k", "b m n k", "b m n k")
        out = per_device(functools.partial(fused, scale=scale), q, k, v, axes=axes, h=h)
    elif bias is not None:
        out = _biased(q, k, v, bias, scale=scale)
    elif k.shape[2] == 1 and not splits(n):
        out = _one_key_head(q, k, v, scale=scale)
    else:  # heads that are split over devices must stay a separate axis
        out = jax.nn.dot_product_attention(q, k, v, scale=scale)
    return constrain(out.reshape(b, p, -1), f"{rows} c", h=h)


def _biased(q: Queries, k: KeysOrValues, v: KeysOrValues, bias: Array, *, scale: float) -> Queries:
    """Takes as many key heads as query heads. JAX's function does not support float16 on a CPU."""
    logits = jnp.einsum("bpnk,bmnk->bnpm", q, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits * scale + bias, axis=-1).astype(v.dtype)
    return jnp.einsum("bnpm,bmnk->bpnk", weights, v)


def _one_key_head(q: Queries, k: KeysOrValues, v: KeysOrValues, *, scale: float) -> Queries:
    """With one key head, n heads of p queries are simply p * n queries of one head, and both
    products are matrix products, without transposes to and from heads."""
    flat, k, v = rearrange(q * scale, "b p n k -> b (p n) k"), k[:, :, 0], v[:, :, 0]
    logits = jnp.einsum("bqk,bmk->bqm", flat, k, preferred_element_type=jnp.float32)
    weights = jax.nn.softmax(logits, axis=-1).astype(v.dtype)
    return jnp.einsum("bqm,bmk->bqk", weights, v).reshape(q.shape)


def _fused(q: Queries, k: KeysOrValues):
    """The fused form for these shapes on the current platform, or None."""
    where, (p, m, width) = platform(), (q.shape[1], k.shape[1], q.shape[3])
    if min(p, m) < FUSED_FROM:
        return None
    if where in ("gpu", "cuda") and q.dtype in (jnp.bfloat16, jnp.float16):
        fits = p % 2 == 0 and width % 8 == 0 and width <= 128
        return _cudnn if fits and _has_cudnn_attention() else None
    if where == "tpu" and q.dtype == jnp.bfloat16 and k.shape[2] == 1:
        return _splash
    return None


@functools.cache
def _has_cudnn_attention() -> bool:
    """Whether the GPU is from NVIDIA, Ampere or newer."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))  # AMD's is a name
    return capability.replace(".", "").isdecimal() and float(capability) >= 8.0


def _cudnn(q: Queries, k: KeysOrValues, v: KeysOrValues, *, scale: float) -> Queries:
    """Pads an odd number of keys with a masked one: JAX rejects odd numbers with gradients."""
    b, m = k.shape[:2]
    lengths = None
    if m % 2:
        k, v = (jnp.pad(a, ((0, 0), (0, 1), (0, 0), (0, 0))) for a in (k, v))
        lengths = jnp.full(b, m, jnp.int32)
    return jax.nn.dot_product_attention(
        q, k, v, scale=scale, key_value_seq_lengths=lengths, implementation="cudnn"
    )


def _splash(
    q: Queries, k: KeysOrValues, v: KeysOrValues, *, scale: float, interpret: bool = False
) -> Queries:
    """Treats the queries of all heads as those of one, as in `_one_key_head`; pads the keys to full
    blocks, with the padding in a separate segment."""
    p, n, m = *q.shape[1:3], k.shape[1]
    if p * n % LANES:
        return _one_key_head(q, k, v, scale=scale)
    from jax.experimental.pallas.ops.tpu import splash_attention

    padded = -(-m // LANES) * LANES
    kernel = splash_attention.make_splash_mha_single_device(
        splash_attention.MultiHeadMask([splash_attention.FullMask((p * n, padded))]),
        block_sizes=_block_sizes(p * n, padded),
        interpret=interpret,
    )
    segments = splash_attention.SegmentIds(
        jnp.zeros(p * n, jnp.int32), jnp.asarray(np.arange(padded) >= m, jnp.int32)
    )
    flat = rearrange(q * scale, "b p n k -> b 1 (p n) k")
    k, v = (
        rearrange(jnp.pad(a, ((0, 0), (0, padded - m), (0, 0), (0, 0))), "b m 1 k -> b 1 m k")
        for a in (k, v)
    )
    return jax.vmap(kernel, in_axes=(0, 0, 0, None))(flat, k, v, segments).reshape(q.shape)


def _block_sizes(queries: int, keys: int):
    """The largest blocks that divide the sizes evenly, up to 512 queries by 1024 keys."""
    from jax.experimental.pallas.ops.tpu.splash_attention import BlockSizes

    block_q, block_kv = (
        LANES * max(i for i in range(1, most + 1) if size // LANES % i == 0)
        for size, most in ((queries, 4), (keys, 8))
    )
    forward = dict(block_q=block_q, block_kv=block_kv)
    backward = dict(block_q_dkv=block_q, block_kv_dkv=block_kv)
    return BlockSizes(**forward, **backward, block_q_dq=block_q, block_kv_dq=block_kv)
