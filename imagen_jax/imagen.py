"""The cascade: `Imagen` holds the U-Nets, and wraps the pure functions of `stages` and `sampling`.

    imagen = Imagen(config, rngs=nnx.Rngs(0))
    loss = imagen.loss(images, text_embeds=embeds, unet_number=1, key=key)
    images = imagen.sample(texts=["a red apple"], cond_scale=3.0, key=key)

Training never carries an `Imagen`: its step binds one U-Net and calls `stages.stage_losses`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float
from PIL import Image as PILImage

from imagen_jax import nn, sampling, stages, text
from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.diffusion import samplers
from imagen_jax.resize import resize
from imagen_jax.stages import Draws
from imagen_jax.types import AnyArray, Image, PRNGKey, TextEmbeds, TextMask

SLICES = 20  # calls of the compiled loop a stage is run in: as often is progress reported

Progress = Callable[[int, int, int], None]
"""progress(unet_number, steps done, steps in all). Raise in it to stop."""


class Imagen(nnx.Module):
    """A cascade of U-Nets.

    `unets` are the networks of `config.unets`, or are initialised from `rngs`. A `NullUnet` may
    stand for any of them that is not at hand; it can be neither trained nor sampled from.
    """

    def __init__(
        self,
        config: ImagenConfig,
        *,
        unets: Sequence[nnx.Module] | None = None,
        dtype: DTypeLike = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if (unets is None) == (rngs is None):
            raise ValueError("Imagen needs either its unets or rngs to initialise them.")
        if unets is None:
            unets = [_fresh(unet, dtype, rngs) for unet in config.unets]
        _check_unets(config, unets)
        self.config = config
        self.unets = nnx.List(unets)

    def loss(
        self,
        images: AnyArray,
        *,
        unet_number: int | None = None,
        key: PRNGKey | None = None,
        draws: Draws | None = None,
        texts: Sequence[str] | None = None,
        text_embeds: TextEmbeds | None = None,
        text_masks: TextMask | None = None,
        cond_images: AnyArray | None = None,
    ) -> Float[Array, ""]:
        """The training loss of one U-Net (reference `Imagen.forward`).

        `images` are (b, size, size, c), in [0, 1] or uint8, not smaller than the stage. What
        `draws` leaves open is drawn from `key`. Raises ValueError for unfit input.
        """
        config = self.config
        unet_number = _training_number(config, unet_number)
        if texts is not None and text_embeds is None and config.condition_on_text:
            if len(texts) != len(images):
                raise ValueError(f"{len(texts)} texts for {len(images)} images.")
            text_embeds, text_masks = self.encode_text(texts)
        check_text(config, text_embeds, len(images))
        losses, _ = stages.stage_losses(
            config,
            self.unets[unet_number - 1],
            images,
            unet_number=unet_number,
            key=key,
            draws=draws,
            text_embeds=text_embeds,
            text_masks=text_masks,
            cond_images=cond_images,
        )
        return jnp.mean(losses)

    def encode_text(self, texts: Sequence[str]) -> tuple[TextEmbeds, TextMask]:
        """Embeddings and mask of captions, by the encoder that the configuration names."""
        return _encoder(self.config.text_encoder_name)(list(texts))

    def sample(
        self,
        *,
        key: PRNGKey | None = None,
        draws: Sequence[Float[AnyArray, "_ b _ _ c"]] | None = None,
        texts: Sequence[str] | None = None,
        text_embeds: TextEmbeds | None = None,
        text_masks: TextMask | None = None,
        cond_images: AnyArray | None = None,
        inpaint_images: AnyArray | None = None,
        inpaint_masks: Bool[AnyArray, "masks h w"] | None = None,
        inpaint_resample_times: int = 5,
        inpaint_variance: Literal["exact", "reference"] = "exact",
        init_images: AnyArray | Sequence[AnyArray | None] | None = None,
        skip_steps: int | Sequence[int | None] | None = None,
        batch_size: int = 1,
        cond_scale: float | Sequence[float] = 1.0,
        cfg_remove_parallel_component: bool = True,
        cfg_keep_parallel_frac: float = 0.0,
        lowres_sample_noise_level: float | None = None,
        start_at_unet_number: int = 1,
        start_image_or_video: AnyArray | None = None,
        stop_at_unet_number: int | None = None,
        return_all_unet_outputs: bool = False,
        return_pil_images: bool = False,
        timesteps: int | Sequence[int] | None = None,
        sampler: Literal["ancestral", "ddim"] = "ancestral",
        eta: float = 0.0,
        progress: Progress | None = None,
    ):
        """Draws pictures, (b, size, size, c) in [0, 1] or lists of PIL images (reference `sample`).

        `init_images`, `skip_steps`, `cond_scale` and `timesteps` take one value, or one per U-Net.
        `inpaint_masks` are True where `inpaint_images` are kept. `draws` gives the noises of each
        stage that runs, in the reference's order: of the low-resolution picture, the initial one,
        then one a step (with inpainting: the known part's, the step's, the renoising's).
        `timesteps` replaces the configuration's number of steps; `eta` is DDIM's. Another key,
        text, guidance weight, number of steps or threshold compiles nothing new; guidance on or
        off (`cond_scale` 1) are two programs. Raises ValueError for unfit input.
        """
        config = self.config
        if texts is not None and text_embeds is None and config.condition_on_text:
            text_embeds, text_masks = self.encode_text(texts)
        check_text(config, text_embeds, None)
        if (key is None) == (draws is None):
            raise ValueError("sample needs either a key or draws.")
        if text_embeds is not None:
            text_masks = stages.default_text_mask(text_embeds, text_masks)
            batch_size = text_embeds.shape[0]
        batch_size = _inpainting_batch(config, inpaint_images, inpaint_masks, batch_size)
        numbers = _stages_to_run(config, start_at_unet_number, stop_at_unet_number)
        scales, steps, skips, inits = (
            _per_unet(config, name, value)
            for name, value in (
                ("cond_scale", cond_scale),
                ("timesteps", timesteps),
                ("skip_steps", skip_steps),
                ("init_images", init_images),
            )
        )
        if config.cond_drop_prob == 0 and any(scale != 1 for scale in scales):
            raise ValueError("cond_scale other than 1 needs a model trained with cond_drop_prob.")
        picture = None
        if numbers[0] > 1:
            if start_image_or_video is None:
                raise ValueError(f"starting at U-Net {numbers[0]} needs start_image_or_video.")
            size = config.image_sizes[numbers[0] - 2]
            picture = stages.to_float(start_image_or_video)
            picture = resize(picture, size, mode=config.resize_mode)
            if text_embeds is None and inpaint_images is None:
                batch_size = len(picture)
            if len(picture) != batch_size:
                raise ValueError(f"{len(picture)} start images for a batch of {batch_size}.")
        level = config.lowres_sample_noise_level
        level = level if lowres_sample_noise_level is None else lowres_sample_noise_level
        if draws is not None and len(draws) != len(numbers):
            raise ValueError(f"{len(draws)} sequences of draws for {len(numbers)} stages.")

        outputs = []
        for place, number in enumerate(numbers):
            i = number - 1
            if isinstance(self.unets[i], nn.NullUnet):
                raise ValueError(f"U-Net {number} has no weights: there is nothing to sample from.")
            program = sampling.Program(
                config=config,
                unet_number=number,
                dtype=self.unets[i].dtype,
                guided=text_embeds is not None and scales[i] != 1,
                remove_parallel_component=cfg_remove_parallel_component,
                sampler=sampler,
                inpaint_variance=inpaint_variance,
            )
            inpainting = inpaint_images is not None
            picture = sample_stage(
                nnx.to_pure_dict(nnx.split(self.unets[i])[1]),
                program,
                batch_size=batch_size,
                key=None if key is None else jax.random.fold_in(key, number),
                noises=None if draws is None else jnp.asarray(draws[place]),
                num_steps=config.stage(number).timesteps if steps[i] is None else steps[i],
                skip_steps=skips[i] or 0,
                cond_scale=scales[i],
                keep_parallel_frac=cfg_keep_parallel_frac,
                eta=eta,
                progress=progress,
                text_embeds=text_embeds,
                text_masks=text_masks,
                previous=picture,
                lowres_noise_level=jnp.float32(level) if number > 1 else None,
                cond_images=cond_images,
                init_images=inits[i],
                inpaint_images=inpaint_images,
                inpaint_masks=inpaint_masks,
                resample_times=jnp.int32(inpaint_resample_times) if inpainting else None,
            )
            outputs.append(picture)
        if return_pil_images:
            outputs = [to_pil(output) for output in outputs]
        return outputs if return_all_unet_outputs else outputs[-1]


def sample_stage(
    params,
    program: sampling.Program,
    *,
    batch_size: int,
    num_steps: int,
    key: PRNGKey | None = None,
    noises: Array | None = None,
    skip_steps: int = 0,
    cond_scale: float = 1.0,
    keep_parallel_frac: float = 0.0,
    eta: float = 0.0,
    progress: Progress | None = None,
    **given,
) -> Image:
    """Runs one stage: prepares, loops in slices and finishes. `given` goes to `sampling.start`."""
    grid = samplers.make_grid(num_steps, program.stage.noise_schedule, skip_steps=skip_steps)
    total = int(grid.num_steps)
    percentile = program.config.dynamic_thresholding_percentile
    program = program.without_numbers()
    if noises is not None:
        _check_noises(noises, total, given)
    drawn = dict(program=program, key=key, noises=noises)
    carry, conditioning = sampling.start(params, batch_size=batch_size, **drawn, **given)
    numbers = sampling.Guidance(
        *(jnp.float32(number) for number in (cond_scale, keep_parallel_frac, percentile, eta))
    )
    stride = -(-total // SLICES)
    for first in range(0, total, stride):
        last = min(first + stride, total)
        if progress is not None:
            progress(program.unet_number, first, total)
        carry = sampling.advance(
            params, carry, conditioning, numbers, grid, np.int32(first), np.int32(last), **drawn
        )
        if progress is not None:
            jax.block_until_ready(carry)
    if progress is not None:
        progress(program.unet_number, total, total)
    return sampling.finish(carry, conditioning, config=program.config)


def to_pil(images: Float[AnyArray, "b h w c"]) -> list[PILImage.Image]:
    """Pictures in [0, 1] as PIL images, 8 bits a channel."""
    pixels = np.asarray(jnp.round(jnp.clip(images, 0, 1) * 255)).astype(np.uint8)
    return [PILImage.fromarray(p[..., 0] if p.shape[-1] == 1 else p) for p in pixels]


def check_text(config: ImagenConfig, text_embeds: TextEmbeds | None, count: int | None) -> None:
    """Raises ValueError unless text is there exactly when the cascade wants it, of its width."""
    if config.condition_on_text and text_embeds is None:
        raise ValueError("this cascade is conditioned on text: give texts or text_embeds.")
    if text_embeds is None:
        return
    if not config.condition_on_text:
        raise ValueError("text_embeds are given, and condition_on_text is off.")
    if text_embeds.shape[-1] != config.text_embed_dim:
        raise ValueError(
            f"text_embeds are {text_embeds.shape[-1]} wide, text_embed_dim is "
            f"{config.text_embed_dim}."
        )
    if count is not None and text_embeds.shape[0] != count:
        raise ValueError(f"{text_embeds.shape[0]} text_embeds for {count} images.")


@functools.lru_cache(maxsize=1)
def _encoder(name: str):
    return text.load_encoder(name)


def _fresh(unet, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    if isinstance(unet, NullUnetConfig):
        return nn.NullUnet()
    params = nn.init_fn(unet)(rngs.params())
    return nn.bind(unet, params, dtype=dtype)


def _check_unets(config: ImagenConfig, unets: Sequence[nnx.Module]) -> None:
    if len(unets) != len(config.unets):
        raise ValueError(f"{len(unets)} unets for {len(config.unets)} configurations.")
    for number, (unet, wanted) in enumerate(zip(unets, config.unets, strict=True), 1):
        if not isinstance(unet, nn.NullUnet) and unet.config != wanted:
            raise ValueError(f"U-Net {number} is not the one that its configuration describes.")


def _training_number(config: ImagenConfig, unet_number: int | None) -> int:
    if unet_number is None and len(config.unets) > 1:
        raise ValueError(f"say which U-Net to train: unet_number = 1 .. {len(config.unets)}.")
    number = unet_number or 1
    if isinstance(config.stage(number).unet, NullUnetConfig):
        raise ValueError(f"U-Net {number} is a NullUnet: it cannot be trained.")
    if config.only_train_unet_number not in (None, number):
        raise ValueError(f"only_train_unet_number = {config.only_train_unet_number}, not {number}.")
    return number


def _inpainting_batch(config: ImagenConfig, images, masks, batch_size: int) -> int:
    """The batch size, which unconditional inpainting takes from its pictures."""
    if (images is None) != (masks is None):
        raise ValueError("inpainting needs both inpaint_images and inpaint_masks.")
    if images is None:
        return batch_size
    if not config.condition_on_text and batch_size == 1:
        batch_size = len(images)
    if len(images) != batch_size or len(masks) != batch_size:
        raise ValueError(
            f"{len(images)} inpaint_images and {len(masks)} masks for a batch of {batch_size}."
        )
    return batch_size


def _stages_to_run(config: ImagenConfig, first: int, last: int | None) -> list[int]:
    count = len(config.unets)
    last = count if last is None else last
    if not 1 <= first <= last <= count:
        raise ValueError(
            f"U-Nets {first} to {last} cannot be run in order; the cascade has 1 .. {count}."
        )
    return list(range(first, last + 1))


def _per_unet(config: ImagenConfig, name: str, value) -> tuple:
    count = len(config.unets)
    if not isinstance(value, (tuple, list)):
        return (value,) * count
    if len(value) != count:
        raise ValueError(f"{name} has {len(value)} entries for {count} unets.")
    return tuple(value)


def _check_noises(noises: Array, num_steps: int, given: dict) -> None:
    times = given.get("resample_times")
    wanted = samplers.count_noises(num_steps, resample_times=None if times is None else int(times))
    wanted += 1 + (given.get("previous") is not None)
    if len(noises) != wanted:
        raise ValueError(f"the draws hold {len(noises)} noises; this stage needs {wanted}.")
