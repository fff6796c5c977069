"""One stage of the cascade: its pictures and its training loss, as pure functions.

A stage's pictures are [0, 1] outside and [-1, 1] inside (`auto_normalize_img`). Networks enter as
callables with the signature of `nn.Unet`. Randomness comes from one key, or is given as `Draws`.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from imagen_jax.config import ImagenConfig, StageConfig
from imagen_jax.diffusion import losses, process, schedules
from imagen_jax.resize import resize
from imagen_jax.types import AnyArray, PRNGKey, TextEmbeds, TextMask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """The random draws of a training loss, each given here or, where None, drawn from the key.

    Sampling takes one NHWC sequence of noises per stage instead (`Imagen.sample`). The fields are
    arrays; their annotations are open because a pytree is rebuilt with whatever stands for them.
    """

    times: Any = None
    """(b,) diffusion times in [0, 1]."""
    noise: Any = None
    """(b, size, size, c) of the picture, before cropping."""
    lowres_times: Any = None
    """(b,) or (1,) times of the low-resolution augmentation, in [0, 1]."""
    lowres_noise: Any = None
    """(b, h, w, c) of the low-resolution picture, after cropping."""
    keep_mask: Any = None
    """(b,) bool, False where the text is dropped."""
    crop: Any = None
    """(b, 2) int, top and left pixel of each crop."""
    self_cond: Any = None
    """bool, whether this batch conditions on its own prediction."""


def to_float(images: AnyArray) -> Array:
    """uint8 becomes [0, 1]; floats stay."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def normalize(config: ImagenConfig, images: Array) -> Array:
    """[0, 1] -> [-1, 1], where the configuration asks for it."""
    return images * 2 - 1 if config.auto_normalize_img else images


def unnormalize(config: ImagenConfig, images: Array) -> Array:
    return (images + 1) * 0.5 if config.auto_normalize_img else images


def default_text_mask(text_embeds: TextEmbeds, text_masks: TextMask | None) -> TextMask:
    """True where an embedding is not all zero, unless a mask is given."""
    return jnp.any(text_embeds != 0, axis=-1) if text_masks is None else jnp.asarray(text_masks)


def stage_losses(
    config: ImagenConfig,
    unet: Callable,
    images: AnyArray,
    *,
    unet_number: int,
    key: PRNGKey | None = None,
    draws: Draws | None = None,
    text_embeds: TextEmbeds | None = None,
    text_masks: TextMask | None = None,
    cond_images: AnyArray | None = None,
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Each picture's weighted loss, and the log-SNR it was taken at.

    `images` are square, in [0, 1] or uint8, and at least as large as the stage. Source: the
    reference's `Imagen.forward` and `p_losses`, with two differences. Self-conditioning leaves the
    target alone (there it replaces x_0 by the prediction), and conditions on x_0 whatever the
    objective. `cond_images` are cropped with the picture.
    """
    check_kind(config)
    stage = config.stage(unet_number)
    images = to_float(images)
    check_images(config, stage, images)
    draws = complete_draws(config, unet_number, images.shape[0], key, draws)

    log_snr = schedules.log_snr(jnp.asarray(draws.times), stage.noise_schedule)
    noise = jnp.asarray(draws.noise)
    x0 = normalize(config, resize(images, stage.image_size, mode=config.resize_mode))
    lowres = lowres_log_snr = None
    if stage.previous_image_size is not None:
        lowres = _lowres_of(config, stage, images)
        lowres_log_snr = schedules.log_snr(
            jnp.asarray(draws.lowres_times), config.lowres_noise_schedule
        )
    if cond_images is not None:
        cond_images = to_float(cond_images)
    if draws.crop is not None:
        crop = functools.partial(_crop, corner=draws.crop, size=stage.random_crop_size)
        x0, noise, lowres = crop(x0), crop(noise), crop(lowres)
        if cond_images is not None:
            mode = stage.unet.resize_mode
            cond_images = crop(resize(cond_images, stage.image_size, mode=mode))
    if lowres is not None:
        lowres = process.q_sample(lowres, lowres_log_snr, jnp.asarray(draws.lowres_noise))

    predict = functools.partial(
        unet,
        text_embeds=text_embeds,
        text_mask=None if text_embeds is None else default_text_mask(text_embeds, text_masks),
        keep_mask=draws.keep_mask,
        lowres_cond_img=lowres,
        lowres_noise_times=lowres_log_snr,
        cond_images=cond_images,
        key=None if key is None else jax.random.fold_in(key, len(dataclasses.fields(Draws))),
    )
    x_t = process.q_sample(x0, log_snr, noise)
    if stage.unet.self_cond:

        def own_prediction():
            output = jax.lax.stop_gradient(predict(x_t, log_snr)).astype(x_t.dtype)
            return process.predict_x0(x_t, output, log_snr, stage.pred_objective)

        x0_previous = jax.lax.cond(draws.self_cond, own_prediction, lambda: jnp.zeros_like(x_t))
        predict = functools.partial(predict, self_cond=x0_previous)
    target = process.target(x0, noise, log_snr, stage.pred_objective)
    weight = losses.min_snr_weight(log_snr, stage.pred_objective, stage.min_snr_gamma)
    return losses.per_sample(predict(x_t, log_snr), target, config.loss_type) * weight, log_snr


def complete_draws(
    config: ImagenConfig,
    unet_number: int,
    batch_size: int,
    key: PRNGKey | None,
    draws: Draws | None,
) -> Draws:
    """`draws` with everything that the stage needs and they leave open drawn from `key`.

    Every draw has a key of its own, so that giving one leaves the others as they were. All have
    one row per picture, except the coin. Raises ValueError if something is missing without a key.
    """
    stage, b = config.stage(unet_number), batch_size
    size = stage.image_size
    wanted = {
        "times": lambda k: jax.random.uniform(k, (b,)),
        "noise": lambda k: jax.random.normal(k, (b, size, size, config.channels)),
    }
    if stage.previous_image_size is not None:
        shown = stage.random_crop_size or size
        times = b if config.per_sample_random_aug_noise_level else 1
        wanted["lowres_times"] = lambda k: jnp.broadcast_to(jax.random.uniform(k, (times,)), (b,))
        wanted["lowres_noise"] = lambda k: jax.random.normal(k, (b, shown, shown, config.channels))
    if stage.random_crop_size is not None:
        last = size - stage.random_crop_size
        wanted["crop"] = lambda k: jax.random.randint(k, (b, 2), 0, last + 1)
    if config.condition_on_text:
        wanted["keep_mask"] = lambda k: jax.random.bernoulli(k, 1 - config.cond_drop_prob, (b,))
    if stage.unet.self_cond:
        wanted["self_cond"] = jax.random.bernoulli

    draws = Draws() if draws is None else draws
    drawn = {}
    for i, field in enumerate(dataclasses.fields(Draws)):
        if field.name not in wanted or getattr(draws, field.name) is not None:
            continue
        if key is None:
            raise ValueError(f"the loss needs a key, or draws with {field.name}.")
        drawn[field.name] = wanted[field.name](jax.random.fold_in(key, i))
    return dataclasses.replace(draws, **drawn)


def check_kind(config: ImagenConfig) -> None:
    """Raises ValueError for an elucidated cascade: its networks convert, and run on their own."""
    if config.elucidated is not None:
        raise ValueError(
            "this is an elucidated cascade (ElucidatedImagen): its loss and its sampler are not "
            "here yet."
        )


def check_images(config: ImagenConfig, stage: StageConfig, images: Array) -> None:
    """Raises ValueError for pictures that the stage cannot be trained on."""
    if images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise ValueError(f"images must be square, (b, size, size, c); got {images.shape}.")
    if images.shape[-1] != config.channels:
        raise ValueError(f"images have {images.shape[-1]} channels, the cascade {config.channels}.")
    if images.shape[1] < stage.image_size:
        raise ValueError(
            f"images are {images.shape[1]} pixels wide; U-Net {stage.unet_number} is trained on "
            f"{stage.image_size}: smaller pictures would be enlarged, not learned."
        )


def shrink(config: ImagenConfig, stage: StageConfig, images: Array) -> Array:
    """Pictures in [0, 1] at the size of the stage before."""
    return resize(images, stage.previous_image_size, mode=config.resize_mode, clamp=_range(config))


def _lowres_of(config: ImagenConfig, stage: StageConfig, images: Array) -> Array:
    """The picture shrunk and enlarged again, in [-1, 1]."""
    small = shrink(config, stage, images)
    large = resize(small, stage.image_size, mode=config.resize_mode, clamp=_range(config))
    return normalize(config, large)


def _range(config: ImagenConfig) -> tuple[float, float]:
    return (0.0 if config.auto_normalize_img else -1.0, 1.0)


def _crop(images: Array, *, corner: Int[AnyArray, "b 2"], size: int) -> Array:
    def one(image, corner):
        start = (corner[0], corner[1], 0)
        return jax.lax.dynamic_slice(image, start, (size, size, image.shape[-1]))

    return jax.vmap(one)(images, jnp.asarray(corner))
