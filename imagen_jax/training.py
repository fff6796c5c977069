"""A stage's training loss, as a pure function of its inputs and its random draws.

    images -> the stage's size, normalised -> crop -> noise level, noise -> network -> loss

Random numbers come from one key, with a named stream for each purpose, or are given as `Draws`.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from imagen_jax.conditioning import Condition, Conditioning
from imagen_jax.diffusion.process import Level, q_sample
from imagen_jax.errors import UserError
from imagen_jax.nn import Network
from imagen_jax.resize import resize
from imagen_jax.sharding import constrain
from imagen_jax.stage import Stage, show, to_float
from imagen_jax.streams import stream
from imagen_jax.types import AnyArray, PRNGKey, Size, TextEmbeds, TextMask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Draws:
    """The random draws of a training loss. A field that is None is drawn from the key.

    Sampling takes one NHWC sequence of noises per stage instead (`Imagen.sample`). The fields are
    arrays, whose shapes `complete_draws` checks. They are annotated as Any because JAX rebuilds a
    pytree with arbitrary objects as leaves.
    """

    times: Any = None
    """(b,) determines the noise levels (`Process.draw`): diffusion times in [0, 1], or standard
    normal numbers in an elucidated cascade."""
    noise: Any = None
    """(b, h, w, c) for the image before cropping, as in the reference, or for the crop."""
    lowres_times: Any = None
    """(b,) times of the low-resolution augmentation, in [0, 1]."""
    lowres_noise: Any = None
    """(b, h, w, c) for the low-resolution image, after cropping."""
    keep_mask: Any = None
    """(b,) bool, False where the text is dropped."""
    crop: Any = None
    """(b, 2) int, top and left pixel of each crop."""
    self_cond: Any = None
    """() bool, whether this batch conditions on its own prediction."""


class Inputs(NamedTuple):
    """Inputs of the loss for a batch: cropped, images in [-1, 1]."""

    x0: Array
    noise: Array
    lowres: Array | None
    cond_images: Array | None


def stage_losses(
    stage: Stage,
    network: Network,
    images: AnyArray,
    *,
    key: PRNGKey | None = None,
    draws: Draws | None = None,
    text_embeds: TextEmbeds | None = None,
    text_masks: TextMask | None = None,
    null_text_embeds: TextEmbeds | None = None,
    cond_images: AnyArray | None = None,
) -> tuple[Float[Array, "b"], Float[Array, "b"]]:
    """Returns each image's weighted loss, and the log-SNR at which it was computed.

    `images` are (b, h, w, c), in [0, 1] or uint8, with the stage's aspect ratio and at least its
    size. Source: the reference's `Imagen.forward` and `p_losses`, with two differences:
    self-conditioning does not change the target (there it replaces x_0 by the prediction), and it
    conditions on x_0 for every objective. `cond_images` are cropped with the image. If the stage
    crops, noise drawn from the key has the size of the crop; given noise may have either size.
    `null_text_embeds` replace the text where it is dropped, for networks for which no text means
    the empty text (`ImagenConfig.encodes_blank_text`).
    """
    images = jnp.asarray(images)
    check_images(stage, images)
    if cond_images is not None:
        check_aspect(stage, cond_images.shape, "cond_images")
    draws = complete_draws(stage, images.shape[0], key, draws)
    inputs = prepare(stage, images, draws, cond_images)
    lowres, lowres_level = inputs.lowres, None
    if stage.lowres is not None:
        lowres_level = stage.lowres.process.training_level(jnp.asarray(draws.lowres_times))
        lowres = q_sample(lowres, lowres_level, jnp.asarray(draws.lowres_noise))
    text = None
    if text_embeds is not None:
        masks = default_text_mask(text_embeds, text_masks)
        keep = jnp.asarray(draws.keep_mask)
        if null_text_embeds is not None:
            text_embeds = jnp.where(keep[:, None, None], text_embeds, null_text_embeds)
            keep = jnp.ones_like(keep)
        text = network.encode_text(text_embeds, masks, keep_mask=keep)
    predict = Condition(
        network,
        Conditioning(
            text=text,
            lowres=lowres,
            lowres_time=None if lowres_level is None else lowres_level.conditioning,
            cond_images=inputs.cond_images,
        ),
        key=None if key is None else stream(key, "network"),
    )
    level = stage.process.training_level(jnp.asarray(draws.times))
    if stage.network.self_cond:
        predict = _on_its_own_prediction(stage, predict, inputs, level, draws.self_cond)
    return stage.process.losses(predict, inputs.x0, inputs.noise, level), level.log_snr


def prepare(
    stage: Stage, images: AnyArray, draws: Draws, cond_images: AnyArray | None = None
) -> Inputs:
    """Resizes, crops and normalises images in [0, 1] or uint8 for the network; adds no noise.

    Crops as early as possible: uint8 before conversion to float, and `nearest` resizes uint8.
    """

    def crop(x: Array) -> Array:
        return x if stage.crop is None else _crop(x, corner=draws.crop, size=stage.crop)

    def finish(x: Array) -> Array:
        return stage.normalize(to_float(crop(x)))

    noise, lowres = jnp.asarray(draws.noise), None
    if noise.shape[1:] == stage.sample_shape:
        noise = crop(noise)
    if stage.lowres is not None:
        small = _resized(stage, images, stage.lowres.size, clamp=True)
        lowres = finish(_resized(stage, small, stage.size, clamp=True))
    if cond_images is not None and stage.crop is None:
        cond_images = to_float(cond_images)
    elif cond_images is not None:
        mode = stage.network.resize_mode
        cond_images = to_float(crop(resize(to_float(cond_images), stage.size, mode=mode)))
    return Inputs(finish(_resized(stage, images, stage.size)), noise, lowres, cond_images)


def _resized(stage: Stage, images: AnyArray, size: Size, *, clamp: bool = False) -> Array:
    """Resizes images; `clamp` clips floats to the range of images. uint8 stays uint8 if pixels are
    only selected."""
    images = jnp.asarray(images)
    if images.dtype == jnp.uint8 and (stage.resize_mode == "nearest" or images.shape[1:3] == size):
        return resize(images, size)
    value_range = stage.value_range if clamp else None
    return resize(to_float(images), size, mode=stage.resize_mode, clamp=value_range)


def complete_draws(
    stage: Stage, batch_size: int, key: PRNGKey | None, draws: Draws | None
) -> Draws:
    """Completes `draws`: draws from `key` whatever the stage needs and `draws` lacks.

    Every draw has its own stream, so that giving one does not change the others. All have one row
    per image, except `self_cond`. Raises UserError if a draw is missing and there is no key, or if
    one has the wrong shape.
    """
    draws, drawn = Draws() if draws is None else draws, {}
    for name, (shape, draw) in _wanted(stage, batch_size).items():
        given = getattr(draws, name)
        if given is None:
            if key is None:
                raise UserError(f"the loss needs a key, or draws with {name}.")
            drawn[name] = draw(stream(key, name))
        elif jnp.shape(given) not in (shape, _given_shape(stage, name, shape)):
            raise UserError(f"draws.{name} must have the shape {shape}, got {jnp.shape(given)}.")
    return dataclasses.replace(draws, **drawn)


def _given_shape(stage: Stage, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The other valid shape of a given draw: noise may be for the image before cropping."""
    return (shape[0], *stage.sample_shape) if name == "noise" else shape


def _wanted(stage: Stage, b: int) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Name of each draw that the stage needs -> its shape, and a function that draws it."""
    shown = (b, *stage.trained_size, stage.channels)
    wanted = {
        "times": ((b,), lambda k: stage.process.draw(k, b)),
        "noise": (shown, lambda k: jax.random.normal(k, shown)),
    }
    if stage.lowres is not None:
        lowres, levels = stage.lowres, b if stage.lowres.per_sample else 1
        wanted["lowres_times"] = (
            (b,),
            lambda k: jnp.broadcast_to(lowres.draw(k, levels), (b,)),
        )
        wanted["lowres_noise"] = (shown, lambda k: jax.random.normal(k, shown))
    if stage.crop is not None:
        last = jnp.array([n - m + 1 for n, m in zip(stage.size, stage.crop, strict=True)])
        wanted["crop"] = ((b, 2), lambda k: jax.random.randint(k, (b, 2), 0, last))
    if stage.condition_on_text:
        keep = 1 - stage.cond_drop_prob
        wanted["keep_mask"] = ((b,), lambda k: jax.random.bernoulli(k, keep, (b,)))
    if stage.network.self_cond:
        wanted["self_cond"] = ((), jax.random.bernoulli)
    return wanted


def _on_its_own_prediction(
    stage: Stage, predict: Condition, inputs: Inputs, level: Level, coin: AnyArray
):
    """`predict` conditioned on its own estimate of x_0 if `coin` is true, else on zeros."""
    x = q_sample(inputs.x0, level, inputs.noise)

    def own() -> Array:
        x0 = stage.process.predict(predict, x, level).x0
        return jax.lax.stop_gradient(x0).astype(x.dtype)

    x0_previous = jax.lax.cond(coin, own, lambda: jnp.zeros_like(x))
    return functools.partial(predict, x0_previous=x0_previous)


def split_rows(tree: PyTree) -> PyTree:
    """Splits the batch over the devices. Arrays with four axes are images; scalars are kept."""

    def split(x: Array) -> Array:
        return constrain(x, "b h w _" if x.ndim == 4 else "b ...") if x.ndim else x

    return jax.tree.map(split, tree)


def default_text_mask(text_embeds: TextEmbeds, text_masks: TextMask | None) -> TextMask:
    """The given mask; by default True where an embedding is not all zero."""
    return jnp.any(text_embeds != 0, axis=-1) if text_masks is None else jnp.asarray(text_masks)


def check_images(stage: Stage, images: Array, name: str = "images") -> None:
    """Raises UserError for images that the stage cannot be trained on."""
    check_aspect(stage, images.shape, name)
    if images.shape[-1] != stage.channels:
        raise UserError(
            f"{name} have {images.shape[-1]} channels; the cascade has {stage.channels}."
        )
    if images.shape[1] < stage.size[0] or images.shape[2] < stage.size[1]:
        raise UserError(
            f"{name} are {show(images.shape[1:3])} pixels; U-Net {stage.unet_number} is trained "
            f"on {show(stage.size)}: smaller images would be upsampled, not learned."
        )


def check_aspect(stage: Stage, shape: tuple[int, ...], name: str, *, ndim: int = 4) -> None:
    """Raises UserError for arrays (b, h, w, ...) that resizing would distort."""
    wanted = "(b, h, w, c)" if ndim == 4 else "(b, h, w)"
    if len(shape) != ndim:
        raise UserError(f"{name} must be {wanted}; got {shape}.")
    h, w = stage.size
    if ndim == 4 and shape[1] in (1, 3, 4) and shape[2] * w == shape[3] * h:
        raise UserError(f"{name} must be {wanted}; got {shape}: move the channels to the end.")
    if shape[1] * w != shape[2] * h:
        kind = "square" if h == w else f"of the aspect ratio of {show(stage.size)}"
        raise UserError(f"{name} must be {kind}, {wanted}; got {shape}.")


def shrink(stage: Stage, images: Array) -> Array:
    """Images in [0, 1], resized to the size of the previous stage."""
    return _resized(stage, images, stage.lowres.size, clamp=True)


def _crop(images: Array, *, corner: Int[AnyArray, "b 2"], size: Size) -> Array:
    def one(image, corner):
        return jax.lax.dynamic_slice(image, (corner[0], corner[1], 0), (*size, image.shape[-1]))

    return jax.vmap(one)(images, jnp.asarray(corner))
