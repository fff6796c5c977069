"""Grids of samples from the averaged weights while a run goes on."""

import itertools
from pathlib import Path

import numpy as np

from imagen_jax import distributed, sampling
from imagen_jax.config import ImagenConfig
from imagen_jax.data import labelled_grid, pad_embeds
from imagen_jax.sampling import Progress
from imagen_jax.stage import to_float
from imagen_jax.streams import row_keys, stream
from imagen_jax.training import shrink
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
    given = sampling.Given()
    if feed.encoder is not None:
        tokens = feed.encoder.tokenize([record.caption for record in records], feed.text_len)
        embeds, masks = feed.embed(tokens)
        given = given._replace(text_embeds=embeds, text_masks=masks)
    elif config.condition_on_text:
        embeds, masks = pad_embeds([record.embeds for record in records], feed.text_len)
        given = given._replace(text_embeds=embeds, text_masks=masks)
    defaults = config.sampling_defaults(unet_number)
    if stage.lowres is not None:
        given = given._replace(
            previous=shrink(stage, to_float(real)),
            lowres_noise_level=np.float32(defaults.lowres_noise_level),
        )
    key = stream(feed.layout.key(settings.seed), "preview", unet_number)
    images = sampling.sample_stage(
        params,
        sampling.Program(
            stage=stage,
            dtype=settings.compute_dtype,
            guided=config.condition_on_text and settings.cond_scale != 1,
            sampler=stage.process.sampler,
        ),
        given,
        sampling.Randomness(keys=row_keys(key, len(records))),
        batch_size=len(records),
        steps=sampling.Steps(num_steps=settings.sample_steps),
        numbers=sampling.numbers_for(
            defaults, cond_scale=settings.cond_scale, keep_parallel_frac=0.0, eta=0.0
        ),
        layout=feed.layout,
        progress=progress,
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
