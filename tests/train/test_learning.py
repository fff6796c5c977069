"""It learns: a very small network knows eight captioned pictures by heart."""

import json

import jax
import numpy as np
import pytest

import imagen_jax
from imagen_jax.config import ImagenConfig, UnetConfig
from imagen_jax.data import decode, open_source
from tests import OPTIMISED
from tests.train import support
from train import loop, step
from train.settings import Settings


@pytest.mark.slow
def test_it_learns_eight_pictures(tmp_path, monkeypatch):
    """Without guidance every caption's sample is nearest to its own picture of the eight."""
    # Hundreds of steps are worth compiling well.
    monkeypatch.setattr(step, "compiler_options", lambda *_: OPTIMISED)
    network = UnetConfig(
        dim=16,
        dim_mults=(1, 2),
        attn_dim_head=8,
        attn_heads=2,
        max_text_len=16,
        layer_attns=False,
        layer_cross_attns=(False, True),
        attn_pool_num_latents=4,
        init_cross_embed_kernel_sizes=(3,),
        use_global_context_attn=False,
    )
    config = ImagenConfig(
        unets=network, image_sizes=8, text_encoder_name="demo", pred_objectives="v"
    )
    file = tmp_path / "learner.json"
    file.write_text(json.dumps(config.to_dict()))
    captions = ["red apple", "pear", "eggplant", "broccoli", "panda", "blue heart", "taxi", "crown"]
    listed = tmp_path / "captions.txt"
    listed.write_text("\n".join(captions))
    settings = Settings(
        config=file,
        mesh="1x1",
        workdir=tmp_path / "run",
        captions_from=listed,
        steps=300,
        batch_size=16,
        lr=3e-3,
        warmup_steps=20,
        cosine_decay_max_steps=300,
        ema="plain",
        ema_decay=0.98,
        log_every=100,
        eval_every=300,
        save_every=300,
        sample_every=0,
    )
    assert loop.run(settings, 1)
    drawn = imagen_jax.load(settings.run).sample(
        texts=captions, timesteps=50, key=jax.random.key(1)
    )
    source = open_source("bundled", split="train").with_captions(captions)
    real = np.stack([decode(record.image, image_size=8) for record in source]) / 255
    distances = np.square(np.asarray(drawn)[:, None] - real[None]).mean(axis=(2, 3, 4))
    assert distances.argmin(axis=1).tolist() == list(range(8)), distances.round(3)
    evaluations = support.metrics(settings.run, "eval/train")
    assert evaluations[-1]["loss"] < evaluations[0]["loss"] / 5
