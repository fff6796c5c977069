"""One optimiser step: a pure function, compiled once."""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from imagen_jax import flops, nn, sharding, training
from imagen_jax.compiling import compiler_options
from imagen_jax.sharding import Layout, single
from imagen_jax.stage import Stage
from imagen_jax.streams import stream
from imagen_jax.types import Params, PRNGKey
from train.optimizer import ema_decay, make_optimizer, update_ema
from train.settings import Optimization
from train.state import TrainState

Batch = dict[str, Array]  # images, and text_embeds with text_masks where there is text


def make_train_step(stage: Stage, settings: Optimization, layout: Layout | None = None) -> Callable:
    """step(state, batch, key) -> (state, metrics), compiled for a mesh (by default one device).

    The state is donated, and placed by `layout` before and after. `key` is the stage's for the
    complete run: the step folds in its number, so that a resumed run draws what an uninterrupted
    one would. With accumulation the draws are those of the complete batch.
    """
    return _train_step(stage, settings, layout or single())


def step_flops(stage: Stage, settings: Optimization) -> int:
    """Floating-point operations of the network for one step's batch, forward and backward, without
    what `remat` recomputes."""
    one = jax.ShapeDtypeStruct
    batch = {"images": one((1, *stage.sample_shape), jnp.uint8)}
    if stage.condition_on_text:
        length = stage.network.text_len
        batch["text_embeds"] = one((1, length, stage.network.text_embed_dim), jnp.float32)
        batch["text_masks"] = one((1, length), jnp.bool_)
    key = jax.eval_shape(lambda: jax.random.key(0))
    draws = jax.eval_shape(lambda k: training.complete_draws(stage, 1, k, None), key)
    gradient = jax.value_and_grad(_loss(stage, dataclasses.replace(settings, remat=None)))
    params = nn.abstract(stage.network)[1]
    with sharding.traced_for("cpu"):  # fused kernels compute some of it twice
        return settings.batch_size * flops.count(gradient, params, batch, draws, key)


@functools.lru_cache(maxsize=64)
def _train_step(stage: Stage, settings: Optimization, layout: Layout) -> Callable:
    optimizer = make_optimizer(settings)
    loss_fn = _loss(stage, settings)
    placed = layout.place(TrainState.shapes(stage.network, optimizer))

    @functools.partial(
        jax.jit,
        in_shardings=(placed, layout.batch, layout.replicated),
        out_shardings=(placed, layout.replicated),
        donate_argnums=0,
        compiler_options=compiler_options(layout.mesh.devices.flat[0]),
    )
    @layout.on_mesh
    def train_step(state: TrainState, batch: Batch, key: PRNGKey) -> tuple[TrainState, dict]:
        key = jax.random.fold_in(key, state.step)
        size = batch["images"].shape[0]
        draws = training.split_rows(training.complete_draws(stage, size, key, None))
        loss, grads = _accumulated(loss_fn, state.params, batch, draws, key, settings.accumulate)
        grads = jax.lax.with_sharding_constraint(grads, placed.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        state = dataclasses.replace(
            state,
            step=state.step + 1,
            params=params,
            ema=update_ema(state.ema, params, ema_decay(state.step, settings)),
            opt_state=opt_state,
        )
        return state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    return train_step


def _loss(stage: Stage, settings: Optimization) -> Callable:
    """loss(params, batch, draws, key) -> the mean over the batch."""

    def loss(params: Params, batch: Batch, draws: training.Draws, key: PRNGKey) -> Array:
        dtype = settings.compute_dtype
        network = nn.bind(stage.network, params, dtype=dtype, remat=settings.remat)
        losses, _ = training.stage_losses(stage, network, draws=draws, key=key, **batch)
        return jnp.mean(losses)

    return loss


def _accumulated(
    loss_fn: Callable, params: Params, batch: Batch, draws: training.Draws, key: PRNGKey, parts: int
) -> tuple[Array, Params]:
    """Loss and gradients of the batch, computed in `parts` one after another.

    Every part has rows of every device: row i belongs to part i mod `parts`.
    """
    value_and_grad = jax.value_and_grad(loss_fn)
    if parts == 1:
        return value_and_grad(params, batch, draws, key)

    def split(x):
        if x.ndim == 0:
            return jnp.broadcast_to(x, (parts,))
        return x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1)

    def add(total, part):
        batch, draws, i = part
        batch, draws = training.split_rows((batch, draws))
        return jax.tree.map(
            jnp.add, total, value_and_grad(params, batch, draws, stream(key, "part", i))
        ), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    xs = (*jax.tree.map(split, (batch, draws)), jnp.arange(parts))
    total, _ = jax.lax.scan(add, zero, xs)
    return jax.tree.map(lambda x: x / parts, total)
