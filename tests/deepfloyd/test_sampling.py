"""Sampling loops of DeepFloyd IF against diffusers' pipelines, with the same noises."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from imagen_jax import Imagen, UnetConfig, nn
from imagen_jax.diffusion.discrete import PRESETS, Discrete
from imagen_jax.diffusion.process import beside
from imagen_jax.diffusion.samplers import SAMPLERS, make_grid, run_slice, start
from tests.deepfloyd import networks
from tests.deepfloyd.networks import diffusers, published

B = 2
EMPTY = dict(
    watermarker=None, tokenizer=None, text_encoder=None, safety_checker=None, feature_extractor=None
)


@pytest.fixture
def noises(monkeypatch):
    """What diffusers draws, in its order, as it is drawn: (b, h, w, c)."""
    drawn, random = [], np.random.default_rng(2)

    def randn_tensor(shape, *_, **__):
        drawn.append(random.normal(size=shape).astype(np.float32).transpose(0, 2, 3, 1))
        return torch.from_numpy(drawn[-1].transpose(0, 3, 1, 2).copy())

    for module in (
        "diffusers.pipelines.deepfloyd_if.pipeline_if",
        "diffusers.pipelines.deepfloyd_if.pipeline_if_img2img",
        "diffusers.pipelines.deepfloyd_if.pipeline_if_inpainting",
        "diffusers.pipelines.deepfloyd_if.pipeline_if_superresolution",
        "diffusers.schedulers.scheduling_ddpm",
    ):
        monkeypatch.setattr(f"{module}.randn_tensor", randn_tensor)
    return drawn


def given(weight: float) -> dict:
    mask = np.ones((B, networks.TOKENS), bool)
    return dict(
        text_embeds=networks.embeddings(B),
        text_masks=mask,
        negative_text_embeds=networks.embeddings(B, seed=8),
        negative_text_masks=mask,
        cond_scale=weight,
        sampler="ancestral",
        cfg_remove_parallel_component=False,
    )


def theirs(weight: float) -> dict:
    arguments = given(weight)
    return dict(
        prompt_embeds=torch.from_numpy(arguments["text_embeds"]),
        negative_prompt_embeds=torch.from_numpy(arguments["negative_text_embeds"]),
        guidance_scale=weight,
        output_type="np",
        clean_caption=False,
    )


def filled(drawn: list[np.ndarray], steps: int, before: int) -> np.ndarray:
    """Their noises in our order: the last step's, which is not used, is added."""
    assert len(drawn) == before + steps - 1
    return np.stack([*drawn, np.zeros_like(drawn[-1])])


@pytest.mark.parametrize("spacing, weight", [("smart27", 3.0), (None, 7.0)])
def test_the_base_draws_what_diffusers_draws(noises, spacing, weight):
    """Rounding grows from step to step, the more so the stronger the guidance."""
    unet, schedule = networks.networks()[0], networks.scheduler(0)
    pipe = diffusers.IFPipeline(
        unet=unet, scheduler=schedule, requires_safety_checker=False, **EMPTY
    )
    pipe.set_progress_bar_config(disable=True)
    steps = 27 if spacing else 10
    listed = published.smart27_timesteps if spacing else None
    size = dict(height=networks.SIZES[0], width=networks.SIZES[0])
    wanted = pipe(num_inference_steps=steps, timesteps=listed, **size, **theirs(weight)).images
    got = networks.imagen().sample(
        draws=[filled(noises, steps, 1)],
        timesteps=steps,
        spacing=spacing,
        stop_at_unet_number=1,
        **given(weight),
    )
    np.testing.assert_allclose(got, wanted, atol=1e-3)
    assert np.std(wanted) > 0.1


def test_super_resolution_draws_what_diffusers_draws(noises):
    unet, schedule = networks.networks()[1], networks.scheduler(1)
    pipe = diffusers.IFSuperResolutionPipeline(
        unet=unet,
        scheduler=schedule,
        image_noising_scheduler=networks.scheduler(1, thresholding=False),
        requires_safety_checker=False,
        **EMPTY,
    )
    pipe.set_progress_bar_config(disable=True)
    small = np.random.default_rng(4).uniform(size=(B, *[networks.SIZES[0]] * 2, 3))
    small = small.astype(np.float32)
    image = torch.from_numpy(small.transpose(0, 3, 1, 2) * 2 - 1)
    size = dict(height=networks.SIZES[1], width=networks.SIZES[1])
    wanted = pipe(image=image, num_inference_steps=6, noise_level=250, **size, **theirs(4.0)).images
    first, lowres, *rest = noises
    got = networks.imagen().sample(
        draws=[filled([lowres, first, *rest], 6, 2)],
        timesteps=6,
        start_at_unet_number=2,
        start_image_or_video=small,
        **given(4.0),
    )
    np.testing.assert_allclose(got, wanted, atol=1e-3)
    assert np.std(wanted) > 0.1


def test_image_to_image_draws_what_diffusers_draws(noises):
    unet, schedule = networks.networks()[0], networks.scheduler(0)
    pipe = diffusers.IFImg2ImgPipeline(
        unet=unet, scheduler=schedule, requires_safety_checker=False, **EMPTY
    )
    pipe.set_progress_bar_config(disable=True)
    image = np.random.default_rng(4).uniform(size=(B, *[networks.SIZES[0]] * 2, 3))
    image = image.astype(np.float32)
    wanted = pipe(
        image=torch.from_numpy(image.transpose(0, 3, 1, 2) * 2 - 1),
        num_inference_steps=10,
        strength=0.7,
        **theirs(5.0),
    ).images
    got = networks.imagen().sample(
        draws=[filled(noises, 7, 1)],
        timesteps=10,
        strength=0.7,
        init_images=image,
        stop_at_unet_number=1,
        **given(5.0),
    )
    np.testing.assert_allclose(got, wanted, atol=1e-3)


@pytest.mark.parametrize("strength", [1.0, 0.7])
def test_inpainting_draws_what_diffusers_draws(noises, strength):
    """The known part stays clean, and what is drawn again starts from the noisy image."""
    unet, schedule = networks.networks()[0], networks.scheduler(0)
    pipe = diffusers.IFInpaintingPipeline(
        unet=unet, scheduler=schedule, requires_safety_checker=False, **EMPTY
    )
    pipe.set_progress_bar_config(disable=True)
    size = networks.SIZES[0]
    image = np.random.default_rng(4).uniform(size=(B, size, size, 3)).astype(np.float32)
    drawn_anew = np.zeros((B, size, size), bool)
    drawn_anew[0, 3:9, 2:], drawn_anew[1, :, :5] = True, True
    wanted = pipe(
        image=torch.from_numpy(image.transpose(0, 3, 1, 2) * 2 - 1),
        mask_image=torch.from_numpy(drawn_anew[:, None].astype(np.float32)),
        num_inference_steps=10,
        strength=strength,
        **theirs(5.0),
    ).images
    got = networks.imagen().sample(
        draws=[filled(noises, round(10 * strength), 1)],
        timesteps=10,
        strength=strength,
        init_images=image,
        inpaint_images=image,
        inpaint_masks=~drawn_anew,
        stop_at_unet_number=1,
        **given(5.0),
    )
    np.testing.assert_allclose(got, wanted, atol=1e-3)
    np.testing.assert_allclose(got[~drawn_anew], image[~drawn_anew], atol=1e-7)
    assert np.abs(got - image)[drawn_anew].mean() > 0.05


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_ends_at_the_data(sampler):
    """With the exact answer for data at one point, each draws this point, from any spacing."""
    process, point = Discrete(learned_variance=False), np.full((2, 4, 4, 3), 0.3, np.float32)

    def network(x, level):
        return (x - beside(level.alpha, x) * point) / beside(level.sigma, x)

    for spacing in ("leading", "trailing", "log_snr", "karras", "smart50"):
        grid = make_grid(process, 12, spacing=spacing)
        assert grid.num_steps == (50 if spacing == "smart50" else 12)
        noise = np.random.default_rng(0).normal(size=point.shape).astype(np.float32)
        found = run_slice(
            network, process, start(SAMPLERS[sampler], noise), grid, 0, grid.num_steps,
            sampler=SAMPLERS[sampler], noise=lambda *_, noise=noise: noise,
        )  # fmt: skip
        np.testing.assert_allclose(found.x, point, atol=2e-3, err_msg=spacing)


@pytest.mark.parametrize("name", PRESETS)
def test_respacing_presets_are_diffusers(name):
    grid = Discrete().grid(1, spacing=name)
    assert grid[:-1].astype(int).tolist() == getattr(published, f"{name}_timesteps")
    assert grid[-1] == -1


@pytest.mark.slow
def test_a_stage_of_ours_above_them():
    """Both stages of IF, then imagen-pytorch's U-Net in the same discrete steps: one cascade."""
    own = UnetConfig(
        dim=8, dim_mults=(1, 2), cond_dim=16, text_embed_dim=networks.WIDTH, layer_attns=False,
        attn_heads=2, attn_dim_head=8, max_text_len=networks.TOKENS, memory_efficient=True,
        init_cross_embed_kernel_sizes=(3, 7), attend_at_middle=False,
    )  # fmt: skip
    two = networks.CONFIG
    most = (*two.discrete.sample_max_value, 1.0)
    config = dataclasses.replace(
        two, unets=(*two.unets, own), image_sizes=(*networks.SIZES, 64),
        discrete=dataclasses.replace(two.discrete, sample_max_value=most),
    )  # fmt: skip
    imagen = Imagen(
        config,
        unets=[*networks.imagen().unets, nn.bind(config.unets[2], random_params(config.unets[2]))],
    )
    common = given(4.0) | dict(key=jax.random.key(0))
    images = imagen.sample(timesteps=(3, 2, 2), return_all_unet_outputs=True, **common)
    assert [image.shape for image in images] == [(B, size, size, 3) for size in (16, 32, 64)]
    below = networks.imagen().sample(timesteps=(3, 2), **common)
    np.testing.assert_array_equal(images[1], below)
    assert np.isfinite(images[2]).all() and np.std(images[2]) > 0.01
    text = dict(text_embeds=common["text_embeds"], text_masks=common["text_masks"])
    loss = imagen.loss(images[2], unet_number=3, key=jax.random.key(1), **text)
    assert np.isfinite(loss)


def random_params(config: UnetConfig):
    rng = np.random.default_rng(5)
    return jax.tree.map(
        lambda x: jnp.asarray(0.2 * rng.normal(size=x.shape), x.dtype), nn.abstract(config)[1]
    )
