"""Runs a network's blocks one by one; `remat` decides what the forward pass saves of each."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from imagen_jax.errors import UserError
from imagen_jax.sharding import constrain

REMAT_POLICIES = (
    "nothing_saveable",
    "dots_with_no_batch_dims_saveable",
    "dots_saveable",
    "everything_saveable",
)
"""Names in `jax.checkpoint_policies`: what the forward pass saves of a block, least first. Other
names there are aliases, or functions that build a policy from arguments."""


def check_policy(name: str | None) -> None:
    if name not in (None, *REMAT_POLICIES):
        raise UserError(f"remat = {name!r} is not one of {', '.join(REMAT_POLICIES)}.")


def run(
    block: nnx.Module,
    x: Array,
    *args: Any,
    skip: Array | None = None,
    remat: str | None,
    **kwargs: Any,
) -> Array:
    """Applies the block to `x`, joined with `skip` if given. `remat` recomputes all of this."""

    def call(x, skip, *args, **kwargs):
        return block(x if skip is None else join_channels([x, skip]), *args, **kwargs)

    if remat is not None:
        call = jax.checkpoint(call, policy=getattr(jax.checkpoint_policies, remat))
    with jax.named_scope(type(block).__name__):
        return call(x, skip, *args, **kwargs)


def join_channels(parts: list[Array]) -> Array:
    """Concatenates channels, gathered: sharded ones would have to be redistributed."""
    return jnp.concatenate([constrain(part, "b h w _") for part in parts], axis=-1)
