"""Decode images of every kind to uint8 arrays of one size, ready for a batch.

In this order: EXIF orientation; 16-bit grey to 8 bits; transparency on white (kept for four
channels); the requested colour mode; resizing until the image just covers (h, w), by pillow's
BICUBIC, which antialiases when downsampling; a centre crop. Images are never upsampled.
"""

import io
import struct
import zlib

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from imagen_jax.errors import UserError
from imagen_jax.types import Size, pair

MODES = {1: "L", 3: "RGB", 4: "RGBA"}

# What pillow is known to raise for damaged files; UnidentifiedImageError is an OSError.
_DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    LookupError,
    TypeError,
    OverflowError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode(
    image: bytes | np.ndarray, *, image_size: int | Size, channels: int = 3
) -> UInt8[np.ndarray, "h w c"]:
    """An encoded file, or uint8 pixels (h, w) or (h, w, c), to (height, width) = `image_size`.

    ValueError, in one line, for an image that is damaged, smaller than `image_size` in either axis,
    or of a kind that has no fixed range (float or 32-bit pixels).
    """
    if channels not in MODES:
        raise UserError(f"channels must be 1, 3 or 4, got {channels}")
    size = pair(image_size)
    picture = _from_pixels(image) if isinstance(image, np.ndarray) else _open(image, size)
    if picture.height < size[0] or picture.width < size[1]:
        given, wanted = f"{picture.height}x{picture.width}", "{}x{}".format(*size)
        raise UserError(f"picture of {given} pixels is smaller than {wanted} (height x width)")
    return _cover(_to_mode(picture, MODES[channels]), size).reshape(*size, channels)


def to_uint8(
    image: UInt8[np.ndarray, "..."] | Float[np.ndarray, "..."],
) -> UInt8[np.ndarray, "..."]:
    """Float pictures in [0, 1] to uint8, rounded and clipped; uint8 as it is.

    Raises UserError for values that are not finite: they would come out black.
    """
    if image.dtype == np.uint8:
        return image
    if not np.isfinite(image).all():
        raise UserError("a picture holds values that are not finite (NaN or infinity)")
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def to_pil(image: UInt8[np.ndarray, "..."] | Float[np.ndarray, "..."]) -> Image.Image:
    """One picture (h, w) or (h, w, c), uint8 or float in [0, 1], with c = 1, 3 or 4."""
    return _from_pixels(to_uint8(image))


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    shape = pixels.shape
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise UserError(f"pixels must be uint8 (h, w) or (h, w, c), got {pixels.dtype} {shape}")
    if pixels.ndim == 3 and shape[-1] not in MODES:
        raise UserError(f"a picture has 1, 3 or 4 channels, got {shape[-1]} in shape {shape}")
    return Image.fromarray(pixels[..., 0] if shape[-1] == 1 and pixels.ndim == 3 else pixels)


def _open(image: bytes, size: Size) -> Image.Image:
    """Decode a file and turn it upright. A JPEG may come reduced, to no less than twice `size`."""
    try:
        picture = Image.open(io.BytesIO(image))
        if isinstance(picture, JpegImageFile):
            _reduce(picture, size)
        picture.load()
        return ImageOps.exif_transpose(picture)
    except UnidentifiedImageError as error:  # its message shows the address of the buffer
        raise UserError("corrupt picture: no known format") from error
    except _DAMAGED as error:
        raise UserError(f"corrupt picture: {_one_line(error)}") from error


def _reduce(picture: JpegImageFile, size: Size) -> None:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size; twice the target keeps the antialias."""
    stored = 2 * size[1], 2 * size[0]  # pillow's order: width, height
    if picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8):  # stored on its side
        stored = stored[::-1]
    picture.draft(None, stored)


def _cover(picture: Image.Image, size: Size) -> np.ndarray:
    """Resize a picture until it just covers `size`, and cut out the centre."""
    height, width = size
    scale = max(width / picture.width, height / picture.height)
    covering = max(width, round(picture.width * scale)), max(height, round(picture.height * scale))
    if covering != picture.size:
        picture = picture.resize(covering, Image.Resampling.BICUBIC)
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return np.asarray(picture.crop((left, top, left + width, top + height)))


def _to_mode(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.float32) / 257
        picture = Image.fromarray(np.rint(grey).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise UserError(f"pixels of pillow's mode {picture.mode} have no fixed range")
    if picture.has_transparency_data and mode != "RGBA":
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white
    return picture if picture.mode == mode else picture.convert(mode)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
