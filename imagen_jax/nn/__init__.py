"""The networks. They know nothing of diffusion: noisy image and number in, prediction out."""

from imagen_jax.nn.build import (
    NETWORKS,
    Network,
    NetworkConfig,
    abstract,
    bind,
    build,
    compute_dtype,
    init_fn,
    init_params,
    params_of,
    stored_dtypes,
    stored_shapes,
)
from imagen_jax.nn.unet import NullUnet, TextCond, Unet

__all__ = [
    "NETWORKS",
    "NetworkConfig",
    "Network",
    "NullUnet",
    "TextCond",
    "Unet",
    "abstract",
    "bind",
    "build",
    "compute_dtype",
    "init_fn",
    "init_params",
    "params_of",
    "stored_dtypes",
    "stored_shapes",
]
