"""Networks as functions of their parameters: parameters are pure dicts, and a module is bound to
them where it is called. `NETWORKS` maps the type of a configuration to its network."""

import functools
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array

from imagen_jax.if_config import IFUnetConfig
from imagen_jax.nn.if_unet import IFUnet
from imagen_jax.nn.unet import Unet
from imagen_jax.sharding import Layout
from imagen_jax.streams import ParamKeys
from imagen_jax.types import (
    AnyArray,
    Image,
    KeepMask,
    LogSNR,
    Params,
    PRNGKey,
    TextEmbeds,
    TextMask,
)
from imagen_jax.unet_config import UnetConfig

NetworkConfig = UnetConfig | IFUnetConfig


@runtime_checkable
class Network(Protocol):
    """The interface of a stage's network, which is independent of the diffusion."""

    def encode_text(
        self, text_embeds: TextEmbeds, text_mask: TextMask | None = None, *, keep_mask: KeepMask
    ) -> Any:
        """Everything the text contributes at any noise level, in a form private to the network;
        rows with `keep_mask` False get no text."""

    def __call__(
        self,
        x: Image,
        time: LogSNR,
        *,
        text_cond: Any = None,
        lowres_cond_img: Image | None = None,
        lowres_noise_times: LogSNR | None = None,
        cond_images: AnyArray | None = None,
        self_cond: Image | None = None,
        key: PRNGKey | None = None,
    ) -> Array: ...


NETWORKS: dict[type, Callable[..., nnx.Module]] = {
    UnetConfig: Unet,
    IFUnetConfig: IFUnet,
}
"""Type of a configuration -> its network: `Module(config, *, dtype, remat, rngs)`."""


def build(
    config: NetworkConfig,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str | None = None,
    rngs: nnx.Rngs,
) -> nnx.Module:
    """A newly initialised network of this configuration."""
    return NETWORKS[type(config)](config, dtype=dtype, remat=remat, rngs=rngs)


@functools.lru_cache(maxsize=64)
def abstract(
    config: NetworkConfig, dtype: DTypeLike = jnp.float32, remat: str | None = None
) -> tuple[nnx.GraphDef, Params]:
    """(graph, a pure dict of ShapeDtypeStructs) of a network, without allocating its parameters."""
    module = nnx.eval_shape(
        lambda: build(config, dtype=dtype, remat=remat, rngs=ParamKeys(jax.random.key(0)))
    )
    graph, state = nnx.split(module)
    return graph, nnx.to_pure_dict(state)


def init_params(config: NetworkConfig, key: PRNGKey) -> Params:
    """New parameters as a pure dict. `init_fn` compiles this function."""
    return params_of(build(config, rngs=ParamKeys(key)))


@functools.lru_cache(maxsize=8)
def init_fn(config: NetworkConfig, layout: Layout | None = None) -> Callable[[PRNGKey], Params]:
    """A compiled function: key -> new parameters, created where `layout` places them, never
    unsharded.

    It runs once, so on a CPU XLA does not optimise it: half the compile time, the same numbers.
    """
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    placed = None if layout is None else layout.place(abstract(config)[1])
    return jax.jit(
        lambda key: init_params(config, key), out_shardings=placed, compiler_options=options
    )


def bind(
    config: NetworkConfig,
    params: Params,
    *,
    dtype: DTypeLike = jnp.float32,
    remat: str | None = None,
) -> Any:
    """The network with these parameters, as a callable; cheap, also inside a traced function."""
    return nnx.merge(abstract(config, dtype, remat)[0], params)


def params_of(network: nnx.Module) -> Params:
    """The parameters of a network as a pure dict."""
    return nnx.to_pure_dict(nnx.split(network)[1])


def compute_dtype(name: DTypeLike | None = None) -> DTypeLike:
    """The dtype that networks compute in: by default bfloat16 on accelerators, float32 on a CPU."""
    if name is None:
        name = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return jnp.dtype(name)


def stored_dtypes(params: Params, dtype: DTypeLike) -> Params:
    """The dtype to store each parameter in, for a network that computes in `dtype` and is not
    trained.

    Kernels, biases and embeddings are cast to `dtype` wherever they are used, so they can be stored
    in it: one cast instead of one per denoising step, with bitwise the same results. Gains of norms
    and the frequencies of the noise level are used in float32.
    """

    def of(tree: dict) -> dict:  # indices of lists are keys too
        layer = "kernel" in tree
        return {
            name: of(x)
            if isinstance(x, dict)
            else jnp.dtype(dtype)
            if layer or x.ndim > 1
            else x.dtype
            for name, x in tree.items()
        }

    return of(params)


def stored_shapes(shapes: Params, dtype: DTypeLike) -> Params:
    """The ShapeDtypeStructs of parameters in their `stored_dtypes`."""
    return jax.tree.map(
        lambda x, to: jax.ShapeDtypeStruct(x.shape, to), shapes, stored_dtypes(shapes, dtype)
    )
