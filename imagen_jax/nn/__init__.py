"""The networks. They know no diffusion: a noisy picture and a log-SNR in, a prediction out."""

from imagen_jax.nn.pure import abstract, bind, init_fn, init_params
from imagen_jax.nn.unet import NullUnet, TextCond, Unet

__all__ = ["NullUnet", "TextCond", "Unet", "abstract", "bind", "init_fn", "init_params"]
