"""The networks. They know no diffusion: a noisy picture and a log-SNR in, a prediction out."""

from imagen_jax.nn.unet import NullUnet, TextCond, Unet, abstract, bind, init_params

__all__ = ["NullUnet", "TextCond", "Unet", "abstract", "bind", "init_params"]
