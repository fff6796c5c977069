"""Imagen, the text-to-image cascade, in JAX and Flax."""

from imagen_jax.checkpoint import load, save
from imagen_jax.config import (
    DiscreteConfig,
    ElucidatedConfig,
    ImagenConfig,
    NullUnetConfig,
    UnetConfig,
)
from imagen_jax.errors import UserError
from imagen_jax.imagen import Draws, Imagen
from imagen_jax.nn import NullUnet, Unet
from imagen_jax.pipeline import Pipeline
from imagen_jax.presets import BaseUnet64, SRUnet256, SRUnet1024

__all__ = [
    "BaseUnet64",
    "Draws",
    "ElucidatedConfig",
    "Imagen",
    "ImagenConfig",
    "NullUnet",
    "DiscreteConfig",
    "NullUnetConfig",
    "Pipeline",
    "SRUnet256",
    "SRUnet1024",
    "Unet",
    "UnetConfig",
    "UserError",
    "load",
    "save",
]
