"""The training loss against imagen-pytorch's `Imagen.forward`, draw by draw, to 1e-5 relative."""

import dataclasses
import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from imagen_jax import nn, training
from imagen_jax.config import NullUnetConfig
from imagen_jax.imagen import Imagen
from imagen_jax.stage import to_float
from imagen_jax.training import Draws
from tests import cascades
from tests.cascades import cascade

RANDOM = np.random.default_rng(0)
BATCH = 3
IMAGES = RANDOM.uniform(size=(BATCH, 12, 12, 3)).astype(np.float32)
TEXT = dict(
    text_embeds=RANDOM.standard_normal((BATCH, 4, cascades.WIDTH), np.float32),
    text_masks=np.arange(4) < np.array([[4], [2], [0]]),
)
OBJECTIVES = ("noise", "v", "x_start")
SELF_COND = dict(unet=dict(self_cond=True))
UNCONDITIONAL = dict(unet=dict(cond_on_text=False), condition_on_text=False)


@dataclasses.dataclass(frozen=True)
class Case:
    """One comparison: a stage, what differs from the plainest cascade, and what it is given."""

    name: str
    stage: int = 2
    config: dict[str, Any] = dataclasses.field(default_factory=dict)
    images: np.ndarray = dataclasses.field(default_factory=lambda: IMAGES)
    coin: bool | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def combinations():
    """Every objective with every loss; the stage, the schedules and min-SNR alternate."""
    for i, (objective, loss) in enumerate(itertools.product(OBJECTIVES, ("l1", "l2", "huber"))):
        schedules = ("cosine", "linear") if i % 4 < 2 else ("linear", "cosine")
        yield Case(
            f"{objective} {loss}",
            stage=1 + i % 2,
            config=dict(
                pred_objectives=objective,
                loss_type=loss,
                noise_schedules=schedules,
                lowres_noise_schedule=schedules[0],
                min_snr_loss_weight=i % 3 != 2,
                min_snr_gamma=(5.0, 2.0),
            ),
        )


COND_IMAGES = RANDOM.integers(0, 256, (BATCH, 6, 6, 2), np.uint8)
CASES = [
    *combinations(),
    Case("v without min-SNR", config=dict(pred_objectives="v", min_snr_loss_weight=False)),
    Case("a level for each picture", config=dict(per_sample_random_aug_noise_level=True)),
    Case("crops", config=dict(random_crop_sizes=(None, 5), pred_objectives="v")),
    Case("self-conditioning, tails", config=SELF_COND, coin=False),
    Case("self-conditioning, heads", config=SELF_COND, coin=True),
    Case("self-conditioning, base", stage=1, config=SELF_COND, coin=True),
    Case(
        "self-conditioning on v, tails",
        config=SELF_COND | dict(pred_objectives="v"),
        coin=False,
    ),
    Case(
        "conditioning pictures",
        config=dict(unet=dict(cond_images_channels=2)),
        extra=dict(cond_images=COND_IMAGES),
    ),
    Case("unconditional base", stage=1, config=UNCONDITIONAL),
    Case("unconditional", config=UNCONDITIONAL),
    Case("uint8", images=(IMAGES * 255).astype(np.uint8)),
    Case("of the stage's size", images=IMAGES[:, :8, :8]),
    Case("pictures in [-1, 1]", images=IMAGES * 2 - 1, config=dict(auto_normalize_img=False)),
    *(
        Case(f"{mode}, stage {stage}", stage=stage, config=dict(resize_mode=mode))
        for mode in ("bilinear", "bicubic", "area")
        for stage in (1, 2)
    ),
    Case(
        "bicubic, in [-1, 1]",
        images=np.sign(IMAGES - 0.5),
        config=dict(resize_mode="bicubic", auto_normalize_img=False),
    ),
]


def draws_for(config, number, coin=None) -> Draws:
    stage, random = config.stage(number), np.random.default_rng(number)

    def noise(size):
        return random.standard_normal((BATCH, *size, config.channels), np.float32)

    level = random.uniform(size=BATCH if config.per_sample_random_aug_noise_level else 1)
    return Draws(
        times=np.float32([0.02, 0.4, 0.97]),
        noise=noise(stage.size),
        lowres_times=np.broadcast_to(np.float32(level), (BATCH,)) if number > 1 else None,
        lowres_noise=noise(stage.trained_size) if number > 1 else None,
        keep_mask=np.array([True, False, True]) if config.condition_on_text else None,
        self_cond=None if coin is None else np.array(coin),
    )


def arguments_of(case: Case, config) -> dict[str, Any]:
    text = TEXT if config.condition_on_text else {}
    return dict(unet_number=case.stage) | text | case.extra


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_parity(case):
    config = cascade(**case.config)
    arguments = arguments_of(case, config)
    draws = draws_for(config, case.stage, case.coin)
    want, draws = cascades.reference_loss(cascades.theirs(config), case.images, draws, **arguments)
    got = cascades.ours(config).loss(case.images, draws=draws, **arguments)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_self_conditioning_has_the_right_target(objective):
    """By hand in torch. The reference replaces x_0 by the prediction, so that with v and x_start
    its target is the network's own answer; and it conditions on v itself."""
    config = cascade(**SELF_COND, pred_objectives=objective, image_sizes=(8, 16))
    draws = draws_for(config, 1, True)
    imagen = cascades.theirs(config)
    images = IMAGES[:, :8, :8]

    x0, noise = cascades.to_torch(images) * 2 - 1, cascades.to_torch(draws.noise)
    log_snr = imagen.noise_schedulers[0].log_snr(torch.from_numpy(draws.times))
    alpha, sigma = (f[:, None, None, None].sigmoid().sqrt() for f in (log_snr, -log_snr))
    x_t = alpha * x0 + sigma * noise
    text = dict(text_embeds=TEXT["text_embeds"], text_mask=TEXT["text_masks"])
    given = dict(text, keep_mask=draws.keep_mask, cond_drop_prob=0.1)
    predict = functools.partial(network, imagen.unets[0], x_t, log_snr, given)
    with torch.no_grad():
        first = predict()
        estimate, target, weight = {
            "noise": ((x_t - sigma * first) / alpha.clamp(min=1e-8), noise, 1 / log_snr.exp()),
            "v": (alpha * x_t - sigma * first, alpha * noise - sigma * x0, 1 / (1 + log_snr.exp())),
            "x_start": (first, x0, 1.0),
        }[objective]
        error = (predict(self_cond=estimate) - target).square().mean(dim=(1, 2, 3))
    want = (error * weight * log_snr.exp().clamp(max=5)).mean().item()

    arguments = dict(unet_number=1) | TEXT
    got = cascades.ours(config).loss(images, draws=draws, **arguments)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    wrong, _ = cascades.reference_loss(imagen, images, draws, **arguments)
    assert (abs(wrong / want - 1) < 1e-5) == (objective == "noise")


def network(unet, x, time, given, **more):
    with cascades.parity.keep_mask(given["keep_mask"]):
        return unet(x, time, **cascades.parity.to_torch(given), **more)


class Recorder:
    """A network that answers nothing and keeps what it was given."""

    def encode_text(self, *_, **__):
        return None

    def __call__(self, x, time, **told):
        self.told = dict(told, x=x)
        return jnp.zeros_like(x)


def test_conditioning_pictures_are_cropped_with_the_picture():
    """The reference shows the network all of them, squeezed into the crop."""
    config = cascade(random_crop_sizes=(None, 4), unet=dict(cond_images_channels=2))
    draws = dataclasses.replace(
        draws_for(config, 2), crop=np.array([[0, 4], [3, 1], [2, 2]]), times=np.zeros(3, np.float32)
    )
    cond = np.random.default_rng(5).uniform(size=(BATCH, 8, 8, 2)).astype(np.float32)
    seen = Recorder()
    training.stage_losses(
        config.stage(2), seen, IMAGES[:, :8, :8], draws=draws, cond_images=cond, **TEXT
    )
    for i, (top, left) in enumerate(draws.crop):
        window = slice(top, top + 4), slice(left, left + 4)
        np.testing.assert_array_equal(seen.told["cond_images"][i], cond[i][window])
        clean = IMAGES[i, :8, :8][window] * 2 - 1
        np.testing.assert_allclose(seen.told["x"][i], clean, atol=0.08)  # sigma(0) = 0.0125


@pytest.mark.parametrize("mode", ["nearest", "bilinear"])
@pytest.mark.parametrize("size", [8, 16])
def test_bytes_are_cropped_before_they_become_floats(mode, size):
    """What the network sees is the same to the bit, and no float has the size of the image."""
    stage = cascade(random_crop_sizes=(None, 4), resize_mode=mode).stage(2)
    images = np.random.default_rng(3).integers(0, 256, (BATCH, size, size, 3)).astype(np.uint8)
    draws = training.complete_draws(stage, BATCH, jax.random.key(0), None)
    got = training.prepare(stage, images, draws)
    want = training.prepare(stage, to_float(images), draws)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert a.shape == (BATCH, 4, 4, 3)
        np.testing.assert_array_equal(a, b)
    if mode == "nearest":
        text = str(jax.make_jaxpr(lambda x: training.prepare(stage, x, draws))(images))
        assert f"u8[{BATCH},8,8,3]" in text and f"f32[{BATCH},8,8,3]" not in text


def test_noise_is_given_for_the_image_or_for_its_crop():
    config = cascade(random_crop_sizes=(None, 4))
    stage, corners = config.stage(2), np.array([[0, 4], [3, 1], [2, 2]])
    draws = dataclasses.replace(draws_for(config, 2), crop=corners)
    windows = [(slice(top, top + 4), slice(left, left + 4)) for top, left in draws.crop]
    cropped = np.stack([n[window] for n, window in zip(draws.noise, windows, strict=True)])
    for noise in (draws.noise, cropped):
        given = dataclasses.replace(draws, noise=noise)
        prepared = training.prepare(stage, IMAGES[:, :8, :8], given)
        np.testing.assert_array_equal(prepared.noise, cropped)


def test_jit_equals_eager():
    config = cascade(pred_objectives="v")
    imagen = cascades.ours(config)
    loss = functools.partial(imagen.loss, IMAGES, unet_number=2, **TEXT)
    key = jax.random.key(0)
    np.testing.assert_allclose(jax.jit(lambda k: loss(key=k))(key), loss(key=key), rtol=1e-5)


def test_same_key_same_loss():
    imagen = cascades.ours(cascade())
    losses = [
        imagen.loss(IMAGES, unet_number=1, key=jax.random.key(seed), **TEXT) for seed in (0, 0, 1)
    ]
    assert losses[0] == losses[1] != losses[2]


def test_texts_are_masked_where_they_are_zero():
    imagen = cascades.ours(cascade())
    embeds = TEXT["text_embeds"] * TEXT["text_masks"][..., None]
    loss = functools.partial(imagen.loss, IMAGES, unet_number=1, key=jax.random.key(0))
    assert loss(text_embeds=embeds) == loss(**TEXT)


def test_a_given_draw_leaves_the_others_as_they_were():
    config = cascade(random_crop_sizes=(None, 4), **SELF_COND)
    key = jax.random.key(0)
    drawn = training.complete_draws(config.stage(2), BATCH, key, None)
    for field in dataclasses.fields(Draws):
        value = np.zeros_like(getattr(drawn, field.name))
        given = Draws(**{field.name: value})
        completed = training.complete_draws(config.stage(2), BATCH, key, given)
        for other in dataclasses.fields(Draws):
            want = value if other == field else getattr(drawn, other.name)
            np.testing.assert_array_equal(getattr(completed, other.name), want)


def test_what_is_drawn():
    """Ranges, and one level of noise for the batch unless per_sample_random_aug_noise_level."""
    for each in (False, True):
        config = cascade(random_crop_sizes=(None, 5), per_sample_random_aug_noise_level=each)
        draws = training.complete_draws(config.stage(2), 500, jax.random.key(0), None)
        assert len(np.unique(draws.lowres_times)) == (500 if each else 1)
        assert set(np.unique(draws.crop)) == {0, 1, 2, 3}
        assert 0.85 < np.mean(draws.keep_mask) < 0.95
        assert 0 <= draws.times.min() < 0.01 and 0.99 < draws.times.max() < 1
        assert draws.noise.shape[1:] == (5, 5, 3) and draws.lowres_noise.shape[1:] == (5, 5, 3)
        assert draws.self_cond is None


def test_bfloat16_is_close():
    config = cascade(pred_objectives="v")
    exact = cascades.ours(config)
    unets = [
        nn.bind(u.config, nnx.to_pure_dict(nnx.split(u)[1]), dtype=jnp.bfloat16)
        for u in exact.unets
    ]
    arguments = dict(unet_number=2, draws=draws_for(config, 2), **TEXT)
    loss = Imagen(config, unets=unets).loss(IMAGES, **arguments)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, exact.loss(IMAGES, **arguments), rtol=0.02)


def complains(message, call, *args, **kwargs):
    """One line, and it says what is wrong."""
    with pytest.raises(ValueError, match=message) as error:
        call(*args, **kwargs)
    assert "\n" not in str(error.value)


def test_errors():
    imagen, key = cascades.ours(cascade()), jax.random.key(0)
    loss = functools.partial(imagen.loss, IMAGES, key=key)
    complains("1 .. 2", loss, **TEXT)
    complains("unet_number = 3 is not in 1 .. 2", loss, unet_number=3, **TEXT)
    loss = functools.partial(loss, unet_number=2)
    complains("give texts or text_embeds", loss)
    complains("5 wide, but text_embed_dim is 6", loss, text_embeds=TEXT["text_embeds"][..., :5])
    complains("2 text_embeds for 3 images", loss, text_embeds=TEXT["text_embeds"][:2])
    complains("1 texts for 3 images", loss, texts=["a fox"])
    complains("cond_images are given", loss, cond_images=COND_IMAGES, **TEXT)
    loss = functools.partial(imagen.loss, unet_number=2, **TEXT)
    complains("needs a key, or draws with times", loss, IMAGES)
    draws = dataclasses.replace(draws_for(imagen.config, 2), lowres_noise=None)
    complains("draws with lowres_noise", loss, IMAGES, draws=draws)
    complains("4 channels; the cascade has 3", loss, np.ones((BATCH, 8, 8, 4), np.float32), key=key)
    complains("5 x 5 pixels; U-Net 2", loss, IMAGES[:, :5, :5], key=key)
    complains("square", loss, IMAGES[:, :9], key=key)
    complains(r"images must be \(b, h, w, c\)", loss, IMAGES[..., 0], key=key)
    complains("unet_number = 0 is not in 1 .. 2", imagen.loss, IMAGES, unet_number=0, key=key,
              **TEXT)  # fmt: skip
    for name, value in (("times", np.zeros(2)), ("noise", np.zeros((3, 8, 5, 3)))):
        given = dataclasses.replace(draws_for(imagen.config, 2), **{name: np.float32(value)})
        complains(f"draws.{name} must have the shape", loss, IMAGES, draws=given)


def test_errors_of_other_cascades():
    key, given = jax.random.key(0), dict(unet_number=2, key=jax.random.key(0))
    complains("condition_on_text is off", cascades.ours(cascade(**UNCONDITIONAL)).loss, IMAGES,
              **given, **TEXT)  # fmt: skip
    only = cascades.ours(cascade(only_train_unet_number=1))
    complains("only_train_unet_number = 1: U-Net 2 cannot", only.loss, IMAGES, **given, **TEXT)
    complains("move the channels to the end", cascades.ours(cascade()).loss,
              np.moveaxis(IMAGES, -1, 1), **given, **TEXT)  # fmt: skip
    config = cascade(unet=dict(cond_images_channels=2))
    complains("cond_images are missing", cascades.ours(config).loss, IMAGES, **given, **TEXT)
    complains("cond_images must be square", cascades.ours(config).loss, IMAGES,
              cond_images=COND_IMAGES[:, :4], **given, **TEXT)  # fmt: skip
    config = cascade()
    config = dataclasses.replace(config, unets=(NullUnetConfig(), config.unets[1]))
    null = cascades.ours(config)
    complains("NullUnet: it cannot be trained", null.loss, IMAGES, unet_number=1, key=key, **TEXT)
    complains("either its unets or rngs", Imagen, config)
    complains("1 unets for 2 configurations", Imagen, config, unets=null.unets[:1])
    other = cascades.ours(cascade(unet=dict(cond_images_channels=2)))
    complains(
        "U-Net 1 does not match the configuration: unets.0.cond_images_channels is 2",
        Imagen,
        cascade(),
        unets=other.unets,
    )
