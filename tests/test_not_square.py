"""Images that are not square: (h, w) from network to cascade, on a mesh, in a training run."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import torch
from PIL import Image

from imagen_jax import UnetConfig, nn
from imagen_jax.pipeline import Pipeline
from imagen_jax.resize import resize
from imagen_jax.sharding import make_layout
from imagen_jax.training import stage_losses
from tests import SMALLEST_UNET, cascades, parity
from tests.cascades import cascade
from tools import programs
from train import loop
from train.settings import Settings

RANDOM = np.random.default_rng(0)
BATCH = 2
TEXT = dict(text_embeds=RANDOM.standard_normal((BATCH, 4, cascades.WIDTH), np.float32))
WIDE = dict(image_sizes=((6, 10), (12, 20)), timesteps=3)


def test_a_forward_equals_the_references():
    """On 24 x 40. (`combine_upsample_fmaps` resizes to squares there.)"""
    config = UnetConfig(
        dim=8,
        cond_dim=12,
        dim_mults=(1, 2, 2),
        attn_dim_head=8,
        attn_heads=2,
        text_embed_dim=6,
        max_text_len=5,
        attn_pool_num_latents=4,
        layer_attns=(False, False, True),
        use_linear_attn=(False, True, False),
        layer_cross_attns=(False, True, True),
        init_conv_to_final_conv_residual=True,
        cond_images_channels=2,
        lowres_cond=True,
    )
    reference = parity.reference_unet(config)
    inputs = dict(
        x=RANDOM.standard_normal((BATCH, 24, 40, 3), np.float32),
        time=np.float32([-1.0, 2.0]),
        text_embeds=RANDOM.standard_normal((BATCH, 4, 6), np.float32),
        lowres_cond_img=RANDOM.standard_normal((BATCH, 24, 40, 3), np.float32),
        lowres_noise_times=np.float32([0.5, 1.0]),
        cond_images=RANDOM.standard_normal((BATCH, 24, 40, 2), np.float32),
    )
    with torch.no_grad():
        want = cascades.to_numpy(parity.forward(reference, inputs))
    params = parity.our_params(reference, config)
    run = jax.jit(lambda p, i: nn.bind(config, p)(**i))
    np.testing.assert_allclose(run(params, inputs), want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_losses_are_taken_on_crops_of_the_size():
    """What the network sees, and a loss of every stage."""
    images = RANDOM.uniform(size=(BATCH, 18, 30, 3)).astype(np.float32)
    config = cascade(**WIDE, random_crop_sizes=(None, (6, 8)))
    seen = {}

    class Recorder:
        def encode_text(self, *_, **__): ...

        def __call__(self, x, time, **given):
            seen.update(given, x=x)
            return jax.numpy.zeros_like(x)

    key = jax.random.key(0)
    losses, _ = stage_losses(config.stage(2), Recorder(), images, key=key, **TEXT)
    assert losses.shape == (BATCH,) and seen["x"].shape == (BATCH, 6, 8, 3)
    assert seen["lowres_cond_img"].shape == (BATCH, 6, 8, 3)
    imagen = cascades.ours(config)
    for number in (1, 2):
        assert np.isfinite(imagen.loss(images, unet_number=number, key=key, **TEXT))


def test_sampling_and_inpainting():
    imagen = cascades.ours(cascade(**WIDE))
    known = RANDOM.uniform(size=(BATCH, 24, 40, 3)).astype(np.float32)
    mask = np.zeros((BATCH, 24, 40), bool)
    mask[:, :, :20] = True
    given = dict(inpaint_images=known, inpaint_masks=mask, inpaint_resample_times=1)
    base, large = imagen.sample(key=jax.random.key(0), return_all_unet_outputs=True, **TEXT | given)
    assert base.shape == (BATCH, 6, 10, 3) and large.shape == (BATCH, 12, 20, 3)
    kept = np.asarray(resize(known, (12, 20)))
    np.testing.assert_allclose(large[:, :, :10], kept[:, :, :10], atol=1e-6)
    assert np.abs(large[:, :, 10:] - kept[:, :, 10:]).max() > 0.1
    (picture, _) = imagen.sample(
        key=jax.random.key(0), stop_at_unet_number=1, return_pil_images=True, **TEXT
    )
    assert picture.size == (10, 6)  # pillow has the width first


@pytest.mark.slow
def test_a_run_from_data_to_samples_on_a_mesh(tmp_path):
    """Landscapes in a folder, trained on a 2x2 mesh, previewed, loaded and sampled."""
    data = tmp_path / "data"
    data.mkdir()
    for i in range(6):
        pixels = RANDOM.integers(0, 256, (20, 40, 3), np.uint8)
        Image.fromarray(pixels).save(data / f"{i}.png")
        (data / f"{i}.txt").write_text(f"picture {i}")
    unet = UnetConfig(**SMALLEST_UNET, cond_dim=8, max_text_len=8)
    config = dataclasses.replace(
        cascade(unet=None), unets=(unet, unet), image_sizes=((8, 12), (16, 24)),
        text_encoder_name="demo", text_embed_dim=128, timesteps=2,
    )  # fmt: skip
    file = tmp_path / "cascade.json"
    file.write_text(json.dumps(config.to_dict()))
    settings = Settings(
        config=file, workdir=tmp_path / "run", data=(str(data),), steps=1, batch_size=4, mesh="2x2",
        eval_batches=1, sample_steps=2, heldout_fraction=0.0,
    )  # fmt: skip
    assert loop.run(dataclasses.replace(settings, sample_every=0), 1)
    assert loop.run(settings, 2)
    assert len(list((tmp_path / "run" / "samples").glob("unet*.png"))) == 1
    embeddings = Pipeline.load(tmp_path / "run").encode(["picture 1"])
    spread, alone = (
        next(Pipeline.load(tmp_path / "run", mesh=mesh).generate(embeddings, seeds=[3]))[1]
        for mesh in ("2x2", "1x1")
    )
    assert spread.shape == (16, 24, 3)
    np.testing.assert_allclose(spread, alone, atol=1e-4)


def test_plans_know_the_size():
    stage = cascade(**WIDE).stage(2)
    square = cascade(image_sizes=(6, 12), timesteps=3).stage(2)
    layout = make_layout("2x2", devices=jax.devices()[:4])
    wide, narrow = (
        programs.sampling_step(one, 4, np.float32, layout).model_flops for one in (stage, square)
    )
    assert 1.2 < wide / narrow < 20 / 12 * 1.1
