"""imagen-pytorch's cascade and ours, with the same weights and the same random draws."""

import contextlib
import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch

from imagen_jax import nn
from imagen_jax.config import ImagenConfig, NullUnetConfig, UnetConfig
from imagen_jax.imagen import Imagen
from imagen_jax.interop.configuration import HYPER_PARAMETERS, NOT_ELUCIDATED, OURS
from imagen_jax.interop.reference import import_imagen_pytorch
from imagen_jax.training import Draws
from tests import SMALLEST_UNET, parity

WIDTH = 6  # of the text

SMALLEST = SMALLEST_UNET | dict(cond_dim=6, max_text_len=6)


def cascade(*, unet: dict[str, Any] | None = None, **fields) -> ImagenConfig:
    """Two stages, 5 -> 8 pixels, in five steps; `unet` changes both U-Nets."""
    network = UnetConfig(**SMALLEST | (unet or {}))
    tiny = dict(unets=(network, network), image_sizes=(5, 8), text_embed_dim=WIDTH, timesteps=5)
    return ImagenConfig(**tiny | fields)


@functools.cache
def _networks(config: UnetConfig | NullUnetConfig, seed: int):
    if isinstance(config, NullUnetConfig):
        return import_imagen_pytorch().imagen_pytorch.NullUnet(), nn.NullUnet()
    theirs = parity.reference_unet(config, seed)
    params = jax.tree.map(jnp.asarray, parity.our_params(theirs, config))
    return theirs, nn.bind(config, params)


def ours(config: ImagenConfig) -> Imagen:
    unets = [_networks(unet, i)[1] for i, unet in enumerate(config.unets)]
    return Imagen(config, unets=unets)


def theirs(config: ImagenConfig, unets: list[torch.nn.Module] | None = None) -> torch.nn.Module:
    """The reference's cascade, with networks that all tests share unless others are given."""
    arguments = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name in ("unets", "text_encoder_name", "elucidated", *OURS):
        del arguments[name]
    unets = unets or [_networks(unet, i)[0] for i, unet in enumerate(config.unets)]
    if config.elucidated is None:
        return import_imagen_pytorch().imagen_pytorch.Imagen(unets, **arguments).eval()
    for name in NOT_ELUCIDATED:
        del arguments[name]
    own = {name: getattr(config.elucidated, name) for name in HYPER_PARAMETERS}
    module = import_imagen_pytorch().elucidated_imagen
    return module.ElucidatedImagen(unets, **arguments | own).eval()


def to_torch(value: Any) -> Any:
    """Pictures become NCHW; texts and masks stay as they are."""
    if isinstance(value, (tuple, list)):
        return tuple(map(to_torch, value))
    if not isinstance(value, np.ndarray):
        return value
    return torch.from_numpy((np.moveaxis(value, -1, 1) if value.ndim == 4 else value).copy())


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    return np.moveaxis(tensor.numpy(), 1, -1)


@contextlib.contextmanager
def served(noises: Sequence[np.ndarray]) -> Iterator[None]:
    """torch's normal draws are these, in order, and all of them are used."""
    left = [to_torch(noise) for noise in reversed(noises)]

    def draw(like, *_, **__):
        noise = left.pop()
        assert noise.shape == (like.shape if isinstance(like, torch.Tensor) else like)
        return noise

    with mock.patch.object(torch, "randn", draw), mock.patch.object(torch, "randn_like", draw):
        yield
    assert not left


def reference_loss(
    imagen: torch.nn.Module, images: np.ndarray, draws: Draws, **arguments
) -> tuple[float, Draws]:
    """The reference's loss with these draws, and the draws with the crops that kornia made."""
    module = import_imagen_pytorch().imagen_pytorch
    number = arguments["unet_number"]
    crops = []

    def times(scheduler, batch_size, *, device):
        given = draws.lowres_times if scheduler is imagen.lowres_noise_schedule else draws.times
        return torch.tensor(given[:batch_size])

    class RandomCrop(module.K.RandomCrop):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            crops.append(self)

    noises = [draws.noise] + [draws.lowres_noise] * (number > 1)
    torch.manual_seed(3)
    with contextlib.ExitStack() as patches:
        patch = mock.patch.object
        scheduler = module.GaussianDiffusionContinuousTimes
        patches.enter_context(patch(scheduler, "sample_random_times", times))
        patches.enter_context(patch(module.K, "RandomCrop", RandomCrop))
        patches.enter_context(patch(module, "random", lambda: 0.0 if draws.self_cond else 1.0))
        patches.enter_context(parity.keep_mask(draws.keep_mask))
        patches.enter_context(served(noises))
        patches.enter_context(torch.no_grad())
        loss = imagen(to_torch(images), **{name: to_torch(a) for name, a in arguments.items()})
    if crops:
        corners = crops[0]._params["src"][:, 0].flip(-1).int().numpy()  # (x, y) to (top, left)
        draws = dataclasses.replace(draws, crop=corners)
    return loss.item(), draws


def reference_sample(imagen: torch.nn.Module, draws: Sequence[np.ndarray], **arguments):
    """The reference's pictures with these noises, one sequence a stage, as ours takes them."""
    with served([noise for stage in draws for noise in stage]):
        out = imagen.sample(use_tqdm=False, **{name: to_torch(a) for name, a in arguments.items()})
    return out
