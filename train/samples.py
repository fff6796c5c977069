"""Grids of samples from the averaged weights while a run goes on."""

import itertools
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from imagen_jax import distributed, sampling, stages
from imagen_jax.config import ImagenConfig
from imagen_jax.data import labelled_grid, pad_embeds
from imagen_jax.imagen import Progress, sample_stage
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
    progress: Progress | None = None,
) -> None:
    """RUN/samples/unetN-STEP.png: samples for the first captions, above the real pictures.

    Super-resolution enlarges the real pictures, shrunk. Raise in `progress` to stop.
    """
    stage = config.stage(unet_number)
    records, pictures = zip(*itertools.islice(feed.usable(feed.train), SHOWN), strict=True)
    real = np.stack(pictures)
    told = {}
    if feed.encoder is not None:
        tokens = feed.encoder.tokenize([record.caption for record in records], feed.text_len)
        told["text_embeds"], told["text_masks"] = feed.embed(tokens)
    elif config.condition_on_text:
        embeds, masks = pad_embeds([record.embeds for record in records], feed.text_len)
        told = dict(text_embeds=embeds, text_masks=masks)
    if stage.previous_image_size is not None:
        told["previous"] = stages.shrink(config, stage, stages.to_float(real))
        told["lowres_noise_level"] = jnp.float32(config.lowres_sample_noise_level)
    guided = config.condition_on_text and settings.cond_scale != 1
    program = sampling.Program(
        config=config, unet_number=unet_number, dtype=settings.compute_dtype, guided=guided
    )
    with feed.layout.use():
        images = sample_stage(
            params,
            program,
            batch_size=len(records),
            key=feed.layout.key(settings.seed),
            num_steps=settings.sample_steps,
            cond_scale=settings.cond_scale,
            progress=progress,
            **told,
        )
    images = feed.layout.fetch(images)
    captions = [record.caption or "" for record in records]
    rows = [("sampled", list(images), captions), ("real", list(real), captions)]
    if not distributed.talks():
        return
    path = picture_path(settings, unet_number, step)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    labelled_grid(rows).save(partial, format="png")
    partial.replace(path)


def picture_path(settings: Settings, unet_number: int, step: int) -> Path:
    return settings.run / "samples" / f"unet{unet_number}-{step:07d}.png"
