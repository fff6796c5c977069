"""Named models, as functions that return configurations, and how they are trained.

The U-Nets of Saharia et al. (2022), appendix F, in the reference's reading of them, with the
reference's parameter counts at text width 768: 1,625,742,116, 732,036,754 and 721,244,562.
"""

import dataclasses
from typing import Literal

from imagen_jax.config import ImagenConfig, UnetConfig
from imagen_jax.diffusion_config import DiscreteConfig, ElucidatedConfig
from imagen_jax.if_config import IFUnetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a stage of a preset is trained. The fields are flags of `train.base`, which uses them
    as its defaults."""

    steps: int
    batch_size: int
    optimizer: Literal["adam", "adafactor", "muon"] = "adam"
    lr: float = 1e-4
    warmup_steps: int = 10_000
    ema: Literal["reference", "plain"] = "reference"
    ema_decay: float = 0.9999


def BaseUnet64(**overrides) -> UnetConfig:
    """The text-to-64 x 64 U-Net, 1.6 billion parameters."""
    paper = dict(
        dim=512,
        dim_mults=(1, 2, 3, 4),
        num_resnet_blocks=3,
        layer_attns=(False, True, True, True),
        layer_cross_attns=(False, True, True, True),
        attn_heads=8,
        ff_mult=2.0,
        memory_efficient=False,
    )
    return UnetConfig(**paper | overrides)


def SRUnet256(**overrides) -> UnetConfig:
    """The 64 -> 256 U-Net, 0.7 billion parameters with `lowres_cond`."""
    paper = dict(
        dim=128,
        dim_mults=(1, 2, 4, 8),
        num_resnet_blocks=(2, 4, 8, 8),
        layer_attns=(False, False, False, True),
        layer_cross_attns=(False, False, False, True),
        attn_heads=8,
        ff_mult=2.0,
        memory_efficient=True,
    )
    return UnetConfig(**paper | overrides)


def SRUnet1024(**overrides) -> UnetConfig:
    """The 256 -> 1024 U-Net: `SRUnet256` without self-attention."""
    return SRUnet256(**dict(layer_attns=False) | overrides)


def ImagenBase64(**overrides) -> IFUnetConfig:
    """The paper's own base (appendix F.1), text to 64 x 64: joint attention to text and image,
    BigGAN's resampling, pooled text. 2.3 billion parameters with T5-XXL."""
    paper = dict(dim=512, activation="silu", learned_variance=False)
    return IFUnetConfig(**paper | overrides)


def IFStageI(size: Literal["M", "L", "XL"] = "XL", **overrides) -> IFUnetConfig:
    """DeepFloyd IF's base, text to 64 x 64: 0.4, 0.9 or 4.3 billion parameters. The configurations
    of M and L are not public: their widths are inferred from published sizes."""
    return IFUnetConfig(**dict(dim={"M": 192, "L": 320, "XL": 704}[size]) | overrides)


def IFStageII(size: Literal["M", "L"] = "L", **overrides) -> IFUnetConfig:
    """DeepFloyd IF's 64 -> 256: 0.5 or 1.2 billion parameters (the width of M is inferred)."""
    dim = {"M": 96, "L": 160}[size]
    published = dict(
        dim=dim,
        dim_mults=(1, 2, 4, 6, 8),
        num_resnet_blocks=(2, 2, 3, 5, 5),
        layer_attns=(False, False, False, True, True),
        time_cond_dim=8 * dim,
        lowres_cond=True,
        skip_scale=1 / 0.7071,
    )
    return IFUnetConfig(**published | overrides)


def imagen() -> ImagenConfig:
    """The paper-sized cascade, 64 -> 256 -> 1024, super-resolution on 256-pixel crops at 1024.

    Super-resolution predicts v: memory-efficient U-Nets drift in colour when they predict noise
    (imagen-pytorch issue 72). Low-resolution images are means, like those that the base is trained
    on; every fourth pixel, the reference's default, is not what a base draws (docs/quality.md).
    """
    return ImagenConfig(
        unets=(BaseUnet64(), SRUnet256(), SRUnet1024()),
        image_sizes=(64, 256, 1024),
        text_encoder_name="google/t5-v1_1-xxl",
        pred_objectives=("noise", "v", "v"),
        resize_mode="area",
        random_crop_sizes=(None, None, 256),
    )


def paper() -> ImagenConfig:
    """The cascade of the paper's appendix F: its own base, then its efficient U-Nets.

    All predict noise, in 1,000 steps where the paper's time is continuous; the schedules are
    cosine, cosine and linear; thresholding is practically unlimited. `imagen` is the reference's
    reading of the same appendix.
    """
    return ImagenConfig(
        unets=(ImagenBase64(), SRUnet256(), SRUnet1024()),
        image_sizes=(64, 256, 1024),
        text_encoder_name="google/t5-v1_1-xxl",
        discrete=DiscreteConfig(
            betas=("squaredcos_cap_v2", "squaredcos_cap_v2", "linear"), sample_max_value=1e6
        ),
        resize_mode="area",
        random_crop_sizes=(None, None, 256),
    )


def demo() -> ImagenConfig:
    """Two stages, 16 -> 32, small enough to learn a few dozen pictures on a laptop."""
    text = dict(max_text_len=24, attn_pool_num_latents=8, cond_dim=64)
    heads = dict(attn_dim_head=32, attn_heads=4)
    base = UnetConfig(
        dim=48,
        dim_mults=(1, 2, 4),
        layer_attns=(False, False, True),
        layer_cross_attns=(False, True, True),
        init_cross_embed_kernel_sizes=(3, 7),
        **heads,
        **text,
    )
    enlarge = UnetConfig(
        dim=32,
        dim_mults=(1, 2, 2),
        layer_attns=False,
        layer_cross_attns=(False, False, True),
        init_cross_embed_kernel_sizes=(3, 7),
        **heads,
        **text,
    )
    return ImagenConfig(
        unets=(base, enlarge),
        image_sizes=(16, 32),
        text_encoder_name="demo",
        timesteps=(32, 16),
        pred_objectives="v",
        noise_schedules="cosine",
        lowres_noise_schedule="cosine",
        lowres_sample_noise_level=0.1,
        per_sample_random_aug_noise_level=True,
    )


def scenes() -> ImagenConfig:
    """Three stages, 8 -> 16 -> 32, for the captioned shapes of `data.scenes`, on a laptop.

    What made it learn which colour goes where (see the table in docs/quality.md): noise levels
    around those at which this is decided (`P_mean`; the reference's objectives give them almost no
    weight), an encoder from whose embeddings it can be read (`train.text_encoder`), no attention
    pool, and a base small enough to see many images. What made it draw shapes: low-resolution
    images that are means (`area`), like those that the base draws, with so much noise that shapes
    come from the text.
    """
    text = dict(max_text_len=24, cond_dim=64, attn_pool_text=False)
    shared = dict(attn_dim_head=32, attn_heads=4, init_cross_embed_kernel_sizes=(3, 7), **text)
    base = UnetConfig(
        dim=48,
        dim_mults=(1, 2),
        layer_attns=(False, True),
        layer_cross_attns=(True, True),
        **shared,
    )
    shapes = UnetConfig(
        dim=32,
        dim_mults=(1, 2, 2),
        layer_attns=False,
        layer_cross_attns=(False, True, True),
        **shared,
    )
    edges = UnetConfig(
        dim=16,
        dim_mults=(1, 2),
        layer_attns=False,
        layer_cross_attns=False,
        attend_at_middle=False,
        **shared | dict(init_cross_embed_kernel_sizes=(3, 5)),
    )
    return ImagenConfig(
        unets=(base, shapes, edges),
        image_sizes=(8, 16, 32),
        text_encoder_name="demo",
        elucidated=ElucidatedConfig(
            P_mean=(0.3, -0.3, -0.8), sigma_data=0.9, sigma_min=0.02, sigma_max=40
        ),
        resize_mode="area",
        lowres_noise_schedule="cosine",
        lowres_noise_range=((0.0, 0.0), (0.2, 0.4), (0.0, 0.2)),
        lowres_sample_noise_level=(0.0, 0.2, 0.05),
        per_sample_random_aug_noise_level=True,
    )


def tiny() -> ImagenConfig:
    """Two stages, 8 -> 16: for tests, compiles in seconds and draws nothing worth seeing."""
    shared = dict(
        dim=8,
        cond_dim=16,
        dim_mults=(1, 2),
        attn_dim_head=8,
        attn_heads=2,
        max_text_len=16,
        attn_pool_num_latents=4,
        init_cross_embed_kernel_sizes=(3, 7),
    )
    return ImagenConfig(
        unets=(
            UnetConfig(**shared, layer_attns=(False, True), layer_cross_attns=(False, True)),
            UnetConfig(**shared, layer_attns=False, memory_efficient=True),
        ),
        image_sizes=(8, 16),
        text_encoder_name="demo",
        timesteps=10,
        pred_objectives=("noise", "v"),
    )


PRESETS = {"imagen": imagen, "paper": paper, "demo": demo, "scenes": scenes, "tiny": tiny}

PAPER = Recipe(steps=2_500_000, batch_size=2048)
"""Saharia et al. 2022, Section 4.1 and appendix C. At the published peak of 256 TPU v5e a step of
the base takes at least 150 ms, one of super-resolution 118 ms: 4.3 and 3.4 days, computed from the
compiled programs (benchmarks/README.md), not run."""

_DEMO = Recipe(
    steps=1600, batch_size=16, lr=1e-3, warmup_steps=100, ema="plain", ema_decay=0.995
)  # an average over the last 200 steps or so

_MUON = dataclasses.replace(_DEMO, optimizer="muon", warmup_steps=50, ema_decay=0.99)

RECIPES: dict[str, tuple[Recipe, ...]] = {
    "imagen": (dataclasses.replace(PAPER, optimizer="adafactor"), PAPER, PAPER),
    "paper": (dataclasses.replace(PAPER, optimizer="adafactor"), PAPER, PAPER),
    "demo": (_DEMO, dataclasses.replace(_DEMO, steps=1000, lr=2e-3)),
    "scenes": (
        dataclasses.replace(_MUON, steps=1400, batch_size=32, lr=1.5e-3),
        dataclasses.replace(_MUON, steps=2400, lr=5e-3),
        dataclasses.replace(_MUON, steps=1100, batch_size=4, lr=5e-3),
    ),
}
"""By preset, one recipe per U-Net."""
