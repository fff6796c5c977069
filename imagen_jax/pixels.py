"""Pixels of an image as uint8 and as a PIL image."""

import io

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from imagen_jax.errors import UserError

CHANNELS = (1, 3, 4)
"""Numbers of channels of an image: grey, RGB, RGB with alpha."""


def to_uint8(
    image: UInt8[np.ndarray, "..."] | Float[np.ndarray, "..."],
) -> UInt8[np.ndarray, "..."]:
    """Float images in [0, 1] to uint8, rounded and clipped; uint8 is returned unchanged.

    Raises UserError for values that are not finite: they would come out black.
    """
    if image.dtype == np.uint8:
        return image
    if not np.isfinite(image).all():
        raise UserError("an image holds values that are not finite (NaN or infinity)")
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def to_pil(image: UInt8[np.ndarray, "..."] | Float[np.ndarray, "..."]) -> Image.Image:
    """One image (h, w) or (h, w, c), uint8 or float in [0, 1], with c = 1, 3 or 4.

    Raises UserError for another shape.
    """
    shape = image.shape
    if image.ndim not in (2, 3) or (image.ndim == 3 and shape[-1] not in CHANNELS):
        raise UserError(f"an image is (h, w) or (h, w, c) with c = 1, 3 or 4, got {shape}")
    pixels = to_uint8(image)
    return Image.fromarray(pixels[..., 0] if pixels.ndim == 3 and shape[-1] == 1 else pixels)


def png(image: UInt8[np.ndarray, "..."] | Float[np.ndarray, "..."]) -> bytes:
    """The bytes of a PNG of one image, given as for `to_pil`."""
    file = io.BytesIO()
    to_pil(image).save(file, format="PNG")
    return file.getvalue()
