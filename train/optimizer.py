"""The optimiser of a run, and the average of its parameters."""

import jax
import jax.numpy as jnp
import optax
import optax.contrib
from jax.typing import DTypeLike
from jaxtyping import Array, BFloat16, Float, Int, PyTree, UInt32

from imagen_jax.types import PRNGKey
from train.settings import Optimization

NEWTON_SCHULZ = ((3.4445, -4.7750, 2.0315),) * 5
"""Muon's iterations, with optax's default coefficients. Given one by one they become a loop in the
program; otherwise all five are unrolled for each kernel, which takes nearly twice as long to
compile, and 1.5 to 2 times as long to run on a CPU (benchmarks/README.md)."""


def learning_rate(settings: Optimization) -> optax.Schedule:
    """lr * min(1, (k + 1) / warmup_steps), times a cosine from 1 at step 0 to 0 if requested.

    As in the reference's `ImagenTrainer`, except that its cosine rises again after
    `cosine_decay_max_steps`; ours stays at 0.
    """
    decay = (
        optax.constant_schedule(settings.lr)
        if settings.cosine_decay_max_steps is None
        else optax.cosine_decay_schedule(settings.lr, settings.cosine_decay_max_steps)
    )
    if not settings.warmup_steps:
        return decay
    return lambda count: decay(count) * jnp.minimum(1.0, (count + 1) / settings.warmup_steps)


def make_optimizer(settings: Optimization) -> optax.GradientTransformation:
    """Clipping, then Adam, Adafactor with factored second moments, or Muon."""
    lr = learning_rate(settings)
    if settings.optimizer == "adam":
        optimizer = optax.adam(lr, b1=settings.beta1, b2=settings.beta2, eps=settings.eps)
    elif settings.optimizer == "muon":
        optimizer = optax.contrib.muon(
            lr, adam_b1=settings.beta1, adam_b2=settings.beta2, eps=settings.eps,
            ns_coeffs=NEWTON_SCHULZ, muon_weight_dimension_numbers=matrices, consistent_rms=0.2,
        )  # fmt: skip
    else:
        optimizer = optax.adafactor(lr, multiply_by_parameter_scale=False)
    if settings.moments == "bfloat16":
        optimizer = in_bfloat16(optimizer)
    # Both have an empty state, so that a run may be resumed with or without clipping.
    clip = optax.identity()
    if settings.max_grad_norm is not None:
        clip = optax.clip_by_global_norm(settings.max_grad_norm)
    return optax.chain(clip, optimizer)


def matrices(params: PyTree) -> PyTree:
    """How Muon sees each kernel between two hidden layers: with input rows and output columns.

    Adam (in Nesterov's form, like Muon) updates the rest: gains, biases, tables, and the first and
    the last convolution.
    """

    def matrix(path, x):
        names = [str(getattr(entry, "key", "")) for entry in path]
        if names[-1] != "kernel" or x.ndim < 2 or {"init_conv", "final_conv"} & set(names):
            return None
        return optax.contrib.MuonDimensionNumbers(tuple(range(x.ndim - 1)), x.ndim - 1)

    return jax.tree_util.tree_map_with_path(matrix, params)


def in_bfloat16(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
    """The same optimiser, with moments stored in half the memory and computed in float32.

    They are rounded stochastically. If they were rounded to nearest, they would not move: bfloat16
    has 8 bits of precision, and a step moves a moment by less than one part in 256.
    """

    def init(params):
        state = jax.tree_util.tree_map_with_path(
            lambda path, x: x.astype(_kept(path, x)), optimizer.init(params)
        )
        return jnp.zeros((), jnp.int32), state

    def update(grads, state, params=None):
        count, kept = state
        wide = jax.tree.map(lambda x: x.astype(jnp.float32) if x.dtype == jnp.bfloat16 else x, kept)
        updates, new = optimizer.update(grads, wide, params)
        leaves, structure = jax.tree_util.tree_flatten_with_path(new)
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), count), len(leaves))
        leaves = [
            round_at_random(x, key) if _kept(path, x) == jnp.bfloat16 else x
            for (path, x), key in zip(leaves, keys, strict=True)
        ]
        return updates, (count + 1, jax.tree.unflatten(structure, leaves))

    return optax.GradientTransformation(init, update)


def _kept(path: tuple, x: Array) -> DTypeLike:
    """bfloat16 for moments; counts, and the coefficients in Muon's state, keep their dtype."""
    is_average = x.dtype == jnp.float32 and x.ndim and getattr(path[-1], "name", "") != "ns_coeffs"
    return jnp.bfloat16 if is_average else x.dtype


def round_at_random(x: Float[Array, "*s"], key: PRNGKey) -> BFloat16[Array, "*s"]:
    """Stochastic rounding to bfloat16: up with the probability that makes the mean exact."""
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    bits = bits + (_scrambled(key, x.shape) >> 16)
    truncated = jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32)
    return jnp.where(jnp.isfinite(x), truncated, x).astype(jnp.bfloat16)


def _scrambled(key: PRNGKey, shape: tuple[int, ...]) -> UInt32[Array, "*s"]:
    """32 bits per element: its index and the key through two rounds of an integer hash (lowbias32,
    nullprogram.com/blog/2018/07/31). Good enough for rounding, at a tenth of threefry's arithmetic.
    A function of the index and the key only, so the same however the array is sharded."""
    x, stride = jnp.zeros(shape, jnp.uint32), 1
    for axis in reversed(range(len(shape))):
        place = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        x, stride = x + place * jnp.uint32(stride % 2**32), stride * shape[axis]
    for seed in jax.random.bits(key, (2,), jnp.uint32):
        x = x ^ seed
        x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
        x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
        x = x ^ (x >> 16)
    return x


def ema_decay(step: Int[Array, ""], settings: Optimization) -> Float[Array, ""]:
    """The weight of the old average at the update that follows step `step` (from 0); 1 keeps it.

    `reference`, ema-pytorch with the reference's settings: an update every 10 steps, copies up to
    step 100, then 1 - (step - 99)^(-2/3), at most `ema_decay`. `plain`: (1 + step) / (10 + step),
    at most `ema_decay`, at every step.
    """
    step = step.astype(jnp.float32)
    if settings.ema == "plain":
        return jnp.minimum(settings.ema_decay, (1 + step) / (10 + step))
    warm = 1 - jnp.maximum(step - 99, 1.0) ** (-2 / 3)
    decay = jnp.where(step <= 100, 0.0, jnp.minimum(warm, settings.ema_decay))
    return jnp.where(step % 10 == 0, decay, 1.0)


def update_ema(ema: PyTree, params: PyTree, decay: Float[Array, ""]) -> PyTree:
    """decay * ema + (1 - decay) * params; exactly `ema` where decay is 1.

    Selected element by element, in the loops that update the parameters. A conditional would
    separate the two updates, and pass complete trees.
    """
    return jax.tree.map(lambda e, p: jnp.where(decay < 1, p + decay * (e - p), e), ema, params)
