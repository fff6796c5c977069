"""Grids of samples from the averaged weights while a run goes on."""

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import stages
from imagen_jax.config import ImagenConfig
from imagen_jax.data import decode, labelled_grid
from imagen_jax.imagen import sample_stage
from imagen_jax.types import Params
from train.feed import Feed
from train.settings import Settings

SHOWN = 8


def write_samples(
    config: ImagenConfig,
    unet_number: int,
    settings: Settings,
    feed: Feed,
    params: Params,
    step: int,
) -> None:
    """RUN/samples/unetN-STEP.png: samples for the first captions, above the real pictures.

    Super-resolution enlarges the real pictures, shrunk.
    """
    stage = config.stage(unet_number)
    records = [feed.train[i] for i in range(min(SHOWN, len(feed.train)))]
    real = np.stack(
        [decode(r.image, image_size=stage.image_size, channels=config.channels) for r in records]
    )
    told = {}
    if config.condition_on_text and feed.encoder is not None:
        captions = [record.caption for record in records]
        tokens = feed.encoder.tokenize(captions, feed.text_len)
        told["text_embeds"], told["text_masks"] = feed.embed(jnp.asarray(tokens))
    if stage.previous_image_size is not None:
        told["previous"] = stages.shrink(config, stage, stages.to_float(real))
        told["lowres_noise_level"] = jnp.float32(config.lowres_sample_noise_level)
    guided = bool(told.get("text_embeds") is not None and settings.cond_scale != 1)
    images = sample_stage(
        params,
        stages.Program(
            config=config, unet_number=unet_number, dtype=settings.compute_dtype, guided=guided
        ),
        batch_size=len(records),
        key=jax.random.key(settings.seed),
        num_steps=settings.sample_steps,
        cond_scale=settings.cond_scale,
        **told,
    )
    captions = [record.caption or "" for record in records]
    rows = [("sampled", list(np.asarray(images)), captions), ("real", list(real), captions)]
    path = settings.run / "samples" / f"unet{unet_number}-{step:07d}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(rows).save(path)
