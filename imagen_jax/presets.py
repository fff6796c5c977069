"""Named models, as functions that return configurations.

The U-Nets of Saharia et al. (2022), appendix F, in the reference's reading of them, with the
reference's parameter counts at text width 768: 1,625,742,116, 732,036,754 and 721,244,562.
"""

from imagen_jax.config import ImagenConfig, UnetConfig


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


def imagen() -> ImagenConfig:
    """The paper-sized cascade, 64 -> 256 -> 1024, super-resolution on 256-pixel crops at 1024.

    Super-resolution predicts v: memory-efficient U-Nets drift in colour when they predict noise
    (imagen-pytorch issue 72).
    """
    return ImagenConfig(
        unets=(BaseUnet64(), SRUnet256(), SRUnet1024()),
        image_sizes=(64, 256, 1024),
        text_encoder_name="google/t5-v1_1-xxl",
        pred_objectives=("noise", "v", "v"),
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


PRESETS = {"imagen": imagen, "demo": demo, "tiny": tiny}
