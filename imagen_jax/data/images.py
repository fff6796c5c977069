"""Decode pictures of every kind to square uint8 arrays, ready for a batch.

In this order: EXIF orientation; 16-bit grey to 8 bits; transparency on white (kept for four
channels); the colour mode asked for; the shorter side resized to `image_size` by pillow's BICUBIC,
which antialiases when it shrinks; the centre square cut out. Pictures are never enlarged.
"""

import io
import struct
import zlib

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

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
    image: bytes | np.ndarray, *, image_size: int, channels: int = 3
) -> UInt8[np.ndarray, "s s c"]:
    """An encoded file, or uint8 pixels (h, w) or (h, w, c), to `image_size` pixels a side.

    ValueError, in one line, for a picture that is damaged, smaller than `image_size`, or of a kind
    that has no fixed range (float or 32-bit pixels).
    """
    if channels not in MODES:
        raise ValueError(f"channels must be 1, 3 or 4, got {channels}")
    if isinstance(image, np.ndarray):
        picture = _from_pixels(image)
        _check_size(picture, image_size)
        return _finish(picture, image_size, channels)
    try:
        picture = Image.open(io.BytesIO(image))
    except UnidentifiedImageError as error:  # its message shows the address of the buffer
        raise ValueError("corrupt picture: no known format") from error
    except _DAMAGED as error:
        raise ValueError(f"corrupt picture: {_one_line(error)}") from error
    _check_size(picture, image_size)
    try:
        # JPEG can be decoded at 1/2, 1/4 or 1/8 of its size; twice the target keeps the antialias.
        picture.draft(None, (2 * image_size, 2 * image_size))
        picture.load()
        picture = ImageOps.exif_transpose(picture)
    except _DAMAGED as error:
        raise ValueError(f"corrupt picture: {_one_line(error)}") from error
    return _finish(picture, image_size, channels)


def to_uint8(
    image: UInt8[np.ndarray, "..."] | Float[np.ndarray, "..."],
) -> UInt8[np.ndarray, "..."]:
    """Float pictures in [0, 1] to uint8, rounded and clipped; uint8 as it is."""
    if image.dtype == np.uint8:
        return image
    return np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)


def to_pil(image: UInt8[np.ndarray, "..."] | Float[np.ndarray, "..."]) -> Image.Image:
    """One picture (h, w) or (h, w, c), uint8 or float in [0, 1], with c = 1, 3 or 4."""
    return _from_pixels(to_uint8(image))


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    shape = pixels.shape
    if pixels.dtype != np.uint8 or pixels.ndim not in (2, 3):
        raise ValueError(f"pixels must be uint8 (h, w) or (h, w, c), got {pixels.dtype} {shape}")
    if pixels.ndim == 3 and shape[-1] not in MODES:
        raise ValueError(f"a picture has 1, 3 or 4 channels, got {shape[-1]} in shape {shape}")
    return Image.fromarray(pixels[..., 0] if shape[-1] == 1 and pixels.ndim == 3 else pixels)


def _check_size(picture: Image.Image, image_size: int) -> None:
    width, height = picture.size
    if min(width, height) < image_size:
        raise ValueError(f"picture of {width}x{height} pixels is smaller than {image_size}")


def _finish(picture: Image.Image, image_size: int, channels: int) -> UInt8[np.ndarray, "s s c"]:
    picture = _to_mode(picture, MODES[channels])
    scale = image_size / min(picture.size)
    size = tuple(max(image_size, round(side * scale)) for side in picture.size)
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = (size[0] - image_size) // 2, (size[1] - image_size) // 2
    picture = picture.crop((left, top, left + image_size, top + image_size))
    return np.asarray(picture).reshape(image_size, image_size, channels)


def _to_mode(picture: Image.Image, mode: str) -> Image.Image:
    if picture.mode.startswith("I;16"):
        grey = np.asarray(picture).astype(np.float32) / 257
        picture = Image.fromarray(np.rint(grey).astype(np.uint8))
    if picture.mode in ("I", "F"):
        raise ValueError(f"pixels of pillow's mode {picture.mode} have no fixed range")
    if picture.has_transparency_data and mode != "RGBA":
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        white.alpha_composite(picture)
        picture = white
    return picture if picture.mode == mode else picture.convert(mode)


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
