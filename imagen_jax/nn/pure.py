"""A U-Net as a function of its parameters: they travel as pure dicts, the module is bound to them
where it is called."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from imagen_jax.config import UnetConfig
from imagen_jax.nn.unet import Unet
from imagen_jax.sharding import Layout
from imagen_jax.types import Params, PRNGKey


@functools.lru_cache(maxsize=64)
def abstract(
    config: UnetConfig, dtype: DTypeLike = jnp.float32, remat: str | None = None
) -> tuple[nnx.GraphDef, Params]:
    """(graph, parameters as ShapeDtypeStructs in a pure dict) of a U-Net, nothing allocated."""
    module = nnx.eval_shape(lambda: Unet(config, dtype=dtype, remat=remat, rngs=nnx.Rngs(0)))
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def init_params(config: UnetConfig, key: PRNGKey) -> Params:
    """Fresh parameters as a pure dict. `init_fn` compiles it."""
    return nnx.to_pure_dict(nnx.split(Unet(config, rngs=nnx.Rngs(params=key)))[1])


@functools.lru_cache(maxsize=8)
def init_fn(config: UnetConfig, layout: Layout | None = None) -> Callable[[PRNGKey], Params]:
    """key -> fresh parameters, compiled; each made where `layout` places it, never whole.

    It runs once, so on a CPU XLA need not optimise it: half the time to compile, the same numbers.
    """
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    placed = None if layout is None else layout.place(abstract(config)[1])
    return jax.jit(
        lambda key: init_params(config, key), out_shardings=placed, compiler_options=options
    )


def bind(
    config: UnetConfig, params: Params, *, dtype: DTypeLike = jnp.float32, remat: str | None = None
) -> Unet:
    """The U-Net of these parameters, as a callable; cheap, also inside a traced function."""
    return nnx.merge(abstract(config, dtype, remat)[0], params)
