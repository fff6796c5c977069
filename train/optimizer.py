"""The optimiser of a run, and the average of its parameters."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, PyTree

from train.settings import Optimization


def learning_rate(settings: Optimization) -> optax.Schedule:
    """lr * min(1, (k + 1) / warmup_steps), times a cosine from 1 at step 0 to 0 where asked for.

    The reference's `ImagenTrainer`, except that its cosine rises again after
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
    """Clipping, then Adam, or Adafactor with factored second moments."""
    lr = learning_rate(settings)
    if settings.optimizer == "adam":
        optimizer = optax.adam(lr, b1=settings.beta1, b2=settings.beta2, eps=settings.eps)
    else:
        optimizer = optax.adafactor(lr, multiply_by_parameter_scale=False)
    # Either has an empty state, so a run may be resumed with and without.
    clip = optax.identity()
    if settings.max_grad_norm is not None:
        clip = optax.clip_by_global_norm(settings.max_grad_norm)
    return optax.chain(clip, optimizer)


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
    """decay * ema + (1 - decay) * params, skipped where decay is 1."""
    return jax.lax.cond(
        decay < 1,
        lambda: jax.tree.map(lambda e, p: p + decay * (e - p), ema, params),
        lambda: ema,
    )
