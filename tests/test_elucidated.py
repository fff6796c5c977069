"""Elucidated cascades (EDM) against imagen-pytorch's `ElucidatedImagen`, draw by draw: losses to
1e-5 relative, two-stage sampling to 1e-3 in [0, 1]."""

import contextlib
import dataclasses
import functools
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
import torch

from imagen_jax.config import ElucidatedConfig, ImagenConfig
from imagen_jax.interop.reference import import_imagen_pytorch
from imagen_jax.training import Draws
from tests import cascades, parity
from tests.cascades import cascade

RANDOM = np.random.default_rng(0)
BATCH = 3
IMAGES = RANDOM.uniform(size=(BATCH, 12, 12, 3)).astype(np.float32)
TEXT = dict(
    text_embeds=RANDOM.standard_normal((BATCH, 4, cascades.WIDTH), np.float32),
    text_masks=np.arange(4) < np.array([[4], [2], [1]]),
)
EACH = dict(
    num_sample_steps=(5, 4),
    sigma_min=(0.01, 0.02),
    sigma_max=(60, 20),
    sigma_data=(0.5, 0.4),
    rho=(7, 5),
    P_mean=(-1.2, -0.8),
    P_std=(1.2, 1.0),
    S_churn=(80, 2),
    S_tmin=(0.05, 0.1),
    S_tmax=(50, 10),
    S_noise=(1.003, 1.01),
)


def elucidated(own: dict[str, Any] | None = None, **fields) -> ImagenConfig:
    own = dict(num_sample_steps=4, lowres_conditioning="time") | (own or {})
    return cascade(elucidated=ElucidatedConfig(**own), **fields)


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    stage: int = 2
    own: dict[str, Any] = dataclasses.field(default_factory=dict)
    fields: dict[str, Any] = dataclasses.field(default_factory=dict)
    coin: bool | None = None


SELF_COND = dict(unet=dict(self_cond=True))
LOSSES = [
    Case("base", stage=1),
    Case("super-resolution"),
    Case("numbers of its own", own=EACH, fields=dict(per_sample_random_aug_noise_level=True)),
    Case("crops", fields=dict(random_crop_sizes=(None, 5))),
    Case("self-conditioning, heads", stage=1, fields=SELF_COND, coin=True),
    Case("self-conditioning, tails", fields=SELF_COND, coin=False),
]


def draws_for(config: ImagenConfig, number: int, coin: bool | None) -> Draws:
    stage, random = config.stage(number), np.random.default_rng(number)
    noise = functools.partial(random.standard_normal, dtype=np.float32)
    level = random.uniform(size=BATCH if config.per_sample_random_aug_noise_level else 1)
    return Draws(
        times=np.float32([-1.7, 0.2, 1.4]),
        noise=noise((BATCH, *stage.sample_shape)),
        lowres_times=np.broadcast_to(np.float32(level), (BATCH,)) if number > 1 else None,
        lowres_noise=noise((BATCH, *stage.trained_size, 3)) if number > 1 else None,
        keep_mask=np.array([True, False, True]),
        self_cond=None if coin is None else np.array(coin),
        crop=np.array([[0, 3], [2, 1], [3, 0]]) if stage.crop else None,
    )


def reference_loss(imagen, draws: Draws, number: int, stage) -> float:
    """The reference draws the noise at the size of the crop; ours is cropped with the image."""
    module = import_imagen_pytorch()
    noise = draws.noise
    if draws.crop is not None:
        noise = np.stack(
            [n[t : t + 5, x : x + 5] for n, (t, x) in zip(noise, draws.crop, strict=True)]
        )

    class RandomCrop:
        def __init__(self, *_, **__):
            self._params = None

        def __call__(self, images, params=None):
            corners = zip(images, draws.crop, strict=True)
            return torch.stack([i[:, t : t + 5, x : x + 5] for i, (t, x) in corners])

    def normal(mean, std, count, **_):
        return (mean + std * torch.from_numpy(draws.times)).exp()

    def times(scheduler, batch_size, *, device):
        return torch.tensor(draws.lowres_times[:batch_size])

    elucidated = module.elucidated_imagen
    scheduler = module.imagen_pytorch.GaussianDiffusionContinuousTimes
    noises = [draws.lowres_noise] * (number > 1) + [noise]
    with contextlib.ExitStack() as patches:
        patch = mock.patch.object
        patches.enter_context(patch(imagen, "noise_distribution", normal))
        patches.enter_context(patch(scheduler, "sample_random_times", times))
        patches.enter_context(patch(elucidated.K, "RandomCrop", RandomCrop))
        patches.enter_context(patch(elucidated, "random", lambda: 0.0 if draws.self_cond else 1.0))
        patches.enter_context(parity.keep_mask(draws.keep_mask))
        patches.enter_context(cascades.served(noises))
        patches.enter_context(torch.no_grad())
        given = {name: torch.from_numpy(array) for name, array in TEXT.items()}
        return imagen(cascades.to_torch(IMAGES), unet_number=number, **given).item()


@pytest.mark.parametrize("case", LOSSES, ids=lambda case: case.name)
def test_losses(case):
    config = elucidated(case.own, **case.fields)
    draws = draws_for(config, case.stage, case.coin)
    want = reference_loss(cascades.theirs(config), draws, case.stage, config.stage(case.stage))
    got = cascades.ours(config).loss(IMAGES, draws=draws, unet_number=case.stage, **TEXT)
    np.testing.assert_allclose(got, want, rtol=1e-5)


SAMPLES = {
    "unguided": ({}, {}, {}),
    "guided": ({}, {}, dict(cond_scale=3.0)),
    "guided plainly": ({}, {}, dict(cond_scale=2.0, cfg_remove_parallel_component=False)),
    "numbers of its own": (EACH, {}, dict(cond_scale=(2.0, 1.0))),
    "deterministic": (dict(S_churn=0), {}, dict(cond_scale=2.0)),
    "another range": ({}, {}, dict(sigma_min=0.05, sigma_max=(30.0, 10.0))),
    "self-conditioned, static": ({}, SELF_COND | dict(dynamic_thresholding=False), {}),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_sampling(name):
    own, fields, arguments = SAMPLES[name]
    config, random = elucidated(own, **fields), np.random.default_rng(3)
    draws = [
        random.standard_normal(
            (1 + i + config.sampling_defaults(1 + i).num_steps, BATCH, *stage.sample_shape),
            np.float32,
        )
        for i, stage in enumerate(config.stages)
    ]
    arguments = arguments | TEXT | dict(return_all_unet_outputs=True)
    want = cascades.reference_sample(cascades.theirs(config), draws, **arguments)
    got = cascades.ours(config).sample(draws=draws, **arguments)
    for ours, theirs in zip(got, want, strict=True):
        np.testing.assert_allclose(ours, cascades.to_numpy(theirs), rtol=0, atol=1e-3)
        assert np.std(ours) > 0.05


def test_super_resolution_is_given_what_training_gave():
    """By default; the reference gives the raw time, and other images come out."""
    theirs, right = elucidated(), elucidated(dict(lowres_conditioning="log_snr"))
    level = np.float32([0.2])
    trained = right.stage(2).lowres.process.training_level(level).conditioning
    for config, want in ((right, trained), (theirs, level)):
        given = config.stage(2).lowres.sampling_process.training_level(level).conditioning
        np.testing.assert_array_equal(given, want)
    key = jax.random.key(0)
    a, b = (cascades.ours(config).sample(key=key, **TEXT) for config in (theirs, right))
    assert np.abs(a - b).max() > 1e-2


def test_the_start_has_the_noise_of_the_first_step():
    """Also where steps are skipped, unlike in the reference."""
    config = elucidated(dict(S_churn=0, sigma_max=40))
    imagen = cascades.ours(config)
    zeros = np.zeros((BATCH, 5, 5, 3), np.float32) + 0.5
    given = dict(key=jax.random.key(0), init_images=zeros, stop_at_unet_number=1, **TEXT)
    late = imagen.sample(skip_steps=3, **given)
    np.testing.assert_allclose(late, 0.5, atol=0.1)  # sigma_min = 0.002 was added to a flat image


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (dict(sigma_max=(80, 40, 20)), "elucidated.sigma_max = .* has 3 entries for 2 unets"),
        (dict(sigma_min=90), "sigma_min = 90.0 must be in"),
        (dict(sigma_min=0), "sigma_min = 0.0 must be in"),
    ],
)
def test_mistakes(own, message):
    fields = cascade().to_dict() | dict(elucidated=own)
    with pytest.raises(ValueError, match=message):
        ImagenConfig.from_dict(fields)
