"""Everything that changes from step to step, as one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from imagen_jax import nn
from imagen_jax.types import Params


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    step: Any  # int32; a pytree is also rebuilt with other leaves, such as shardings
    params: Any
    ema: Any
    opt_state: Any

    @classmethod
    def create(cls, params: Params, optimizer: optax.GradientTransformation) -> "TrainState":
        return cls(
            step=jnp.zeros((), jnp.int32),
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
        )

    @classmethod
    def shapes(
        cls, unet: nn.NetworkConfig, optimizer: optax.GradientTransformation
    ) -> "TrainState":
        """The state of a U-Net as ShapeDtypeStructs, with nothing allocated."""
        return jax.eval_shape(lambda params: cls.create(params, optimizer), nn.abstract(unet)[1])
