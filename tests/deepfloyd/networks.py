"""Small U-Nets of DeepFloyd IF's architecture, in diffusers and here, with the same weights."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import DiscreteConfig, Imagen, ImagenConfig, nn, presets
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.interop import if_configuration, keys
from imagen_jax.interop.if_table import IF_UNET
from imagen_jax.interop.reference import import_imagen_pytorch

import_imagen_pytorch()  # it mends torchvision, which diffusers' models import
import diffusers  # noqa: E402, F401
import torch  # noqa: E402
from diffusers import DDPMScheduler, UNet2DConditionModel  # noqa: E402
from diffusers.pipelines.deepfloyd_if import timesteps as published  # noqa: E402, F401

TOKENS, WIDTH = 77, 96
SMALL = dict(dim=32, attn_dim_head=16, text_embed_dim=WIDTH, pool_heads=4)
BASE = IFUnetConfig(**SMALL, dim_mults=(1, 2), num_resnet_blocks=1, layer_attns=(False, True))
ENLARGE = presets.IFStageII(
    dim_mults=(1, 2),
    num_resnet_blocks=(1, 2),
    layer_attns=(False, True),
    **SMALL | dict(time_cond_dim=64),
)
SIZES = (16, 32)
CONFIG = ImagenConfig(
    unets=(BASE, ENLARGE),
    image_sizes=SIZES,
    text_encoder_name="google/t5-v1_1-xxl",
    text_embed_dim=WIDTH,
    discrete=DiscreteConfig(sample_max_value=(1.5, 1.0)),
    resize_mode="bilinear_corners",
    lowres_sample_noise_level=0.25,
)


def reference(config: IFUnetConfig, size: int, seed: int = 0) -> UNet2DConditionModel:
    """Random weights, nothing left at zero or one."""
    torch.manual_seed(seed)
    network = UNet2DConditionModel.from_config(if_configuration.to_diffusers(config, size))
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    return network.eval()


@functools.cache
def networks() -> tuple[UNet2DConditionModel, ...]:
    """Those of both stages."""
    return tuple(reference(*pair) for pair in zip((BASE, ENLARGE), SIZES, strict=True))


def ours(network: UNet2DConditionModel, config: IFUnetConfig):
    state = {name: value.numpy() for name, value in network.state_dict().items()}
    params = keys.to_jax(state, nn.abstract(config)[1], table=IF_UNET)
    return nn.bind(config, jax.tree.map(jnp.asarray, params))


def imagen(config: ImagenConfig = CONFIG) -> Imagen:
    return Imagen(config, unets=[*map(ours, networks(), config.unets)])


def scheduler(stage: int, **changes) -> DDPMScheduler:
    """As the released models have it; `stage` from 0."""
    most = CONFIG.discrete.sample_max_value[stage]
    released = dict(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        prediction_type="epsilon",
        thresholding=True,
        dynamic_thresholding_ratio=0.95,
        sample_max_value=most,
        clip_sample=True,
    )
    return DDPMScheduler(**released | changes)


def embeddings(count: int, seed: int = 1) -> np.ndarray:
    random = np.random.default_rng(seed)
    return random.normal(size=(count, TOKENS, WIDTH)).astype(np.float32)


def without_variance(config: ImagenConfig) -> ImagenConfig:
    unets = [dataclasses.replace(one, learned_variance=False) for one in config.unets]
    return dataclasses.replace(config, unets=tuple(unets))
