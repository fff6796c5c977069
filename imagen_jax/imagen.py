"""`Imagen`: a cascade of U-Nets with the public calls of the reference, `loss` and `sample`."""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float
from PIL import Image as PILImage

from imagen_jax import nn, text
from imagen_jax.cascade import Request, check_text, sample_cascade
from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.diffusion.grids import Spacing
from imagen_jax.diffusion.process import RenoiseVariance
from imagen_jax.errors import UserError
from imagen_jax.fields import first_difference
from imagen_jax.pixels import to_pil
from imagen_jax.sampling import OnStep, Progress
from imagen_jax.sharding import Layout
from imagen_jax.streams import RowKeys
from imagen_jax.tiling import Tiles
from imagen_jax.training import Draws, stage_losses
from imagen_jax.types import AnyArray, Image, PRNGKey, TextEmbeds, TextMask

__all__ = ["Draws", "Imagen"]


BLANK = "in this cascade missing text is encoded as the empty caption"


class Imagen(nnx.Module):
    """A cascade of U-Nets.

    `unets` are the networks of `config.unets`; if not given, they are initialised from `rngs` and
    compute in `dtype`. A `NullUnet` may replace any that is not available; it can be neither
    trained nor sampled from. `layout` is the mesh that the parameters are on, None for one device.
    `text_encoder` is the encoder that the cascade was trained with, if known: any other is
    rejected. Raises UserError for networks with another configuration.
    """

    def __init__(
        self,
        config: ImagenConfig,
        *,
        unets: Sequence[nnx.Module] | None = None,
        dtype: DTypeLike = jnp.float32,
        layout: Layout | None = None,
        text_encoder: text.Identity | None = None,
        rngs: nnx.Rngs | None = None,
    ):
        if (unets is None) == (rngs is None):
            raise UserError("Imagen needs either its unets or rngs to initialise them.")
        if unets is None:
            unets = [_fresh(unet, dtype, rngs) for unet in config.unets]
        _check_unets(config, unets)
        self.config = config
        self.layout = layout
        self.unets = nnx.List(unets)
        self.text_encoder = text_encoder
        self._encoder: text.TextEncoder | None = None

    def __repr__(self) -> str:
        unets = "".join(f"\n  {unet!r}" for unet in self.unets)
        return f"Imagen(image_sizes={self.config.image_sizes}){unets}"

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
        null_text_embeds: TextEmbeds | None = None,
        cond_images: AnyArray | None = None,
    ) -> Float[Array, ""]:
        """The training loss of one U-Net (reference `Imagen.forward`).

        `images` are (b, h, w, c) with the cascade's aspect ratio, in [0, 1] or uint8, not smaller
        than the stage. What `draws` lacks is drawn from `key`. If no text means the empty text
        (`config.encodes_blank_text`), `text_embeds` come with its embeddings, `null_text_embeds`.
        Raises ValueError for invalid input.
        """
        config, null = self.config, null_text_embeds
        unet_number = _training_number(config, unet_number)
        if texts is not None and text_embeds is None and config.condition_on_text:
            if len(texts) != len(images):
                raise UserError(f"{len(texts)} texts for {len(images)} images.")
            text_embeds, text_masks = self.encode_text(texts)
            if config.encodes_blank_text and null is None:
                null = self.encode_text([""] * len(texts))[0]
        if config.encodes_blank_text and text_embeds is not None and null is None:
            raise UserError(f"{BLANK}: give its embeddings too, as null_text_embeds.")
        check_text(config, text_embeds, len(images))
        losses, _ = stage_losses(
            config.stage(unet_number),
            self.unets[unet_number - 1],
            images,
            key=key,
            draws=draws,
            text_embeds=text_embeds,
            text_masks=text_masks,
            null_text_embeds=null,
            cond_images=cond_images,
        )
        return jnp.mean(losses)

    @property
    def encoder(self) -> text.TextEncoder:
        """The encoder that the configuration names, loaded at its first use and then kept.

        It has the dtype of the networks and is on their mesh. A model that is not in the local
        Hugging Face cache is downloaded. Raises UserError as `text.cascade_encoder` does.
        """
        if self._encoder is None:
            dtypes = [unet.dtype for unet in self.unets if not isinstance(unet, nn.NullUnet)]
            self._encoder = text.cascade_encoder(
                self.config,
                dtype=dtypes[0] if dtypes else jnp.float32,
                layout=self.layout,
                recorded=self.text_encoder,
            )
            self.text_encoder = self._encoder.identity
        return self._encoder

    def release_encoder(self) -> None:
        """Frees the encoder's memory; the next use loads it again."""
        self._encoder = None

    def encode_text(self, texts: Sequence[str]) -> tuple[TextEmbeds, TextMask]:
        """Embeddings, float32 (b, l, d), and mask (b, l) of captions, by `encoder`.

        Captions are encoded at 256 tokens and cut to the l = `config.text_len` that the U-Nets
        read. Raises UserError for an empty caption, and for a string instead of a list.
        """
        return self.encoder(texts, length=self.config.text_len)

    def sample(
        self,
        *,
        key: PRNGKey | RowKeys | None = None,
        draws: Sequence[Float[AnyArray, "_ b _ _ c"]] | None = None,
        other_key: PRNGKey | RowKeys | None = None,
        mix: AnyArray | None = None,
        tiles: Tiles | None = None,
        tile_batch: int = 8,
        texts: Sequence[str] | None = None,
        text_embeds: TextEmbeds | None = None,
        text_masks: TextMask | None = None,
        negative_texts: Sequence[str] | None = None,
        negative_text_embeds: TextEmbeds | None = None,
        negative_text_masks: TextMask | None = None,
        cond_images: AnyArray | None = None,
        inpaint_images: AnyArray | None = None,
        inpaint_masks: AnyArray | None = None,
        inpaint_resample_times: int | None = None,
        inpaint_variance: RenoiseVariance = "exact",
        init_images: AnyArray | Sequence[AnyArray | None] | None = None,
        skip_steps: int | Sequence[int | None] | None = None,
        strength: float | None = None,
        batch_size: int | None = None,
        cond_scale: float | Sequence[float] = 1.0,
        cfg_remove_parallel_component: bool = True,
        cfg_keep_parallel_frac: float = 0.0,
        guidance_interval: tuple[float, float] | None = None,
        guidance_schedule: str | Sequence[float] | None = None,
        guidance_rescale: float = 0.0,
        lowres_sample_noise_level: float | Sequence[float | None] | None = None,
        start_at_unet_number: int = 1,
        start_image_or_video: AnyArray | None = None,
        stop_at_unet_number: int | None = None,
        return_all_unet_outputs: bool = False,
        return_pil_images: bool = False,
        timesteps: int | Sequence[int | None] | None = None,
        sigma_min: float | Sequence[float | None] | None = None,
        sigma_max: float | Sequence[float | None] | None = None,
        spacing: Spacing | None = None,
        sampler: str | None = None,
        eta: float = 0.0,
        progress: Progress | None = None,
        on_step: OnStep | None = None,
    ) -> Image | list[Image] | list[PILImage.Image] | list[list[PILImage.Image]]:
        """Images, (b, h, w, c) in [0, 1] or lists of PIL images (reference `sample`).

        The arguments are the fields of `cascade.Request`. Raises UserError for invalid input.
        """
        arguments = {k: v for k, v in locals().items() if k in Request.__dataclass_fields__}
        if self.config.condition_on_text:
            self._encode_into(arguments, texts, negative_texts)
        outputs = self._sample(Request(**arguments))
        if return_pil_images:
            outputs = [[*map(to_pil, np.asarray(output))] for output in outputs]
        return outputs if return_all_unet_outputs else outputs[-1]

    def _encode_into(
        self,
        arguments: dict[str, Any],
        texts: Sequence[str] | None,
        negative_texts: Sequence[str] | None,
    ) -> None:
        """Adds the embeddings of texts to arguments of `sample` that lack them."""
        blank = self.config.encodes_blank_text
        guided = np.any(np.asarray(arguments["cond_scale"]) != 1)
        if blank and guided and texts is not None and negative_texts is None:
            negative_texts = [""] * len(texts)
        absent = negative_texts is None and arguments["negative_text_embeds"] is None
        if blank and guided and absent and arguments["text_embeds"] is not None:
            raise UserError(f"{BLANK}: give its embeddings too, as negative_text_embeds.")
        if texts is not None and arguments["text_embeds"] is None:
            arguments["text_embeds"], arguments["text_masks"] = self.encode_text(texts)
        if negative_texts is not None and arguments["negative_text_embeds"] is None:
            encode = self.encode_text
            embeds, masks = text.encode_or_absent(encode, negative_texts, blank=blank)
            arguments |= dict(negative_text_embeds=embeds, negative_text_masks=masks)

    def _sample(self, request: Request) -> list[Image]:
        return sample_cascade(
            self.config,
            [None if isinstance(unet, nn.NullUnet) else nn.params_of(unet) for unet in self.unets],
            request,
            dtypes=[getattr(unet, "dtype", None) for unet in self.unets],
            layout=self.layout,
        )


def _fresh(unet, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    if isinstance(unet, NullUnetConfig):
        return nn.NullUnet()
    params = nn.init_fn(unet)(rngs.params())
    return nn.bind(unet, params, dtype=dtype)


def _check_unets(config: ImagenConfig, unets: Sequence[nnx.Module]) -> None:
    if len(unets) != len(config.unets):
        raise UserError(f"{len(unets)} unets for {len(config.unets)} configurations.")
    for number, (unet, wanted) in enumerate(zip(unets, config.unets, strict=True), 1):
        if not isinstance(unet, nn.NullUnet) and unet.config != wanted:
            found = first_difference(unet.config, wanted, f"unets.{number - 1}")
            raise UserError(f"U-Net {number} does not match the configuration: {found}.")


def _training_number(config: ImagenConfig, unet_number: int | None) -> int:
    if unet_number is None and len(config.unets) > 1:
        raise UserError(f"say which U-Net to train: unet_number = 1 .. {len(config.unets)}.")
    number = 1 if unet_number is None else unet_number
    if isinstance(config.stage(number).network, NullUnetConfig):
        raise UserError(f"U-Net {number} is a NullUnet: it cannot be trained.")
    if config.only_train_unet_number not in (None, number):
        raise UserError(
            f"only_train_unet_number = {config.only_train_unet_number}: U-Net {number} cannot be "
            "trained."
        )
    return number
