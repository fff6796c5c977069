"""Decode images of every kind to uint8 arrays of one size, ready for a batch.

In this order: EXIF orientation; 16-bit grey to 8 bits; transparency on white (kept for four
channels); the requested colour mode; resizing until the image just covers (h, w), by pillow's
BICUBIC, which antialiases when downsampling; a crop, of the center or elsewhere. Images are
upsampled only on request. Colours are converted to sRGB if the file has a profile of another colour
space.
"""

import contextlib
import functools
import io
import struct
import zlib
from collections.abc import Iterator

import numpy as np
from jaxtyping import UInt8
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from imagen_jax.data import kinds, records
from imagen_jax.errors import UserError
from imagen_jax.pixels import to_pil
from imagen_jax.types import Size, pair

if kinds.HEIC:
    import pillow_heif

    pillow_heif.register_heif_opener()

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # for the numbers in pixels.CHANNELS

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
)


class TooSmall(UserError):
    """An image that would have to be upsampled."""


def decode(
    image: records.Image,
    *,
    image_size: int | Size,
    channels: int = 3,
    upsample: bool = False,
    crop: tuple[float, float] | None = None,
) -> UInt8[np.ndarray, "h w c"]:
    """The image of a record at (height, width) = `image_size`.

    The longer axis is cropped at the center, or at `crop`: how far down and to the right in [0, 1].
    Raises UserError, in one line, for an image that is damaged, smaller than `image_size` in either
    axis (unless `upsample`), or whose pixels have no fixed range (float or 32-bit).
    """
    if channels not in MODES:
        raise UserError(f"channels must be 1, 3 or 4, got {channels}")
    size = pair(image_size)
    if callable(image):
        image = image(size)
    if isinstance(image, np.ndarray) and image.shape == (*size, channels):
        return _bytes(image)  # already as it should be
    with _one_line_for_damage():
        picture = _from_pixels(image) if isinstance(image, np.ndarray) else _open(image, size)
        if not upsample:
            _check_size(picture.size, size)
        cut = _cover(_to_mode(picture, MODES[channels]), size, crop)
        return cut.reshape(*size, channels)


def read(
    image: bytes, *, channels: int = 3, max_pixels: int | None = None
) -> UInt8[np.ndarray, "h w c"]:
    """An encoded file at its own size, otherwise decoded as in `decode`.

    Raises UserError, before decoding, for more than `max_pixels`.
    """
    with _one_line_for_damage():
        picture = Image.open(io.BytesIO(image))
        if max_pixels is not None and picture.width * picture.height > max_pixels:
            size = f"{picture.height}x{picture.width}"
            raise UserError(f"{size} pixels are more than {max_pixels:,} in all")
        picture.load()
        picture = _to_mode(_to_srgb(_upright(picture)), MODES[channels])
        return np.asarray(picture).reshape(picture.height, picture.width, channels)


def check(image: records.Image, *, image_size: int | Size, upsample: bool = False) -> None:
    """Raises what `decode` would, as far as a file's header shows: for its format and size."""
    if callable(image):
        return
    image_size = 1 if upsample else image_size
    if isinstance(image, np.ndarray):
        _check_size(image.shape[1::-1], pair(image_size))
        return
    with _one_line_for_damage():
        picture = Image.open(io.BytesIO(image))
        stored, size = picture.size, pair(image_size)
        # EXIF is read only if it matters: in a PNG it may follow the pixels. pillow turns TIFF.
        if _smaller(stored, size) != _smaller(stored[::-1], size) and picture.format != "TIFF":
            stored = stored[::-1] if _on_its_side(picture) else stored
        _check_size(stored, size)


def _smaller(stored: tuple[int, int], size: Size) -> bool:
    """Whether an image of pillow's (width, height) is smaller in an axis than (height, width)."""
    return stored[1] < size[0] or stored[0] < size[1]


def _check_size(stored: tuple[int, int], size: Size) -> None:
    if _smaller(stored, size):
        wanted, given = "{}x{}".format(*size), "{}x{}".format(*stored[::-1])
        raise TooSmall(f"smaller than {wanted} pixels (height x width): {given}")


def _from_pixels(pixels: np.ndarray) -> Image.Image:
    return to_pil(_bytes(pixels))


def _bytes(pixels: np.ndarray) -> UInt8[np.ndarray, "..."]:
    if pixels.dtype != np.uint8:
        raise UserError(f"pixels must be uint8, got {pixels.dtype}")
    return pixels


@contextlib.contextmanager
def _one_line_for_damage() -> Iterator[None]:
    """Turns what pillow raises for a file that it cannot decode or convert into a UserError."""
    try:
        yield
    except UserError:
        raise
    except UnidentifiedImageError as error:  # its message shows the address of the buffer
        raise UserError("corrupt picture: no known format") from error
    except Image.DecompressionBombError as error:
        most = 2 * Image.MAX_IMAGE_PIXELS
        raise UserError(f"too large: at most {most:,} pixels are read") from error
    except _DAMAGED as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"corrupt picture: {why}") from error


def _open(image: bytes, size: Size) -> Image.Image:
    """Decode a file and turn it upright. A JPEG may be reduced, to no less than twice `size`."""
    picture = Image.open(io.BytesIO(image))
    if isinstance(picture, JpegImageFile):
        _reduce(picture, size)
    picture.load()
    return _to_srgb(_upright(picture))


def _upright(picture: Image.Image) -> Image.Image:
    ImageOps.exif_transpose(picture, in_place=True)
    return picture


def _to_srgb(picture: Image.Image) -> Image.Image:
    """Apply the file's ICC profile, if it has one that can be used for its mode."""
    profile = picture.info.get("icc_profile")
    if not profile or picture.mode not in ("RGB", "RGBA", "CMYK", "L"):
        return picture
    if (transform := _transform(profile, picture.mode)) is None:
        return picture
    if picture.mode != "RGBA":
        return ImageCms.applyTransform(picture, transform)
    colours = ImageCms.applyTransform(picture.convert("RGB"), transform)
    colours.putalpha(picture.getchannel("A"))
    return colours


@functools.lru_cache(maxsize=32)
def _transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB; None for sRGB itself, and for profiles that cannot be used."""
    try:
        own = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if "srgb" in ImageCms.getProfileDescription(own).lower():
            return None
        read = "RGB" if mode == "RGBA" else mode
        return ImageCms.buildTransform(own, ImageCms.createProfile("sRGB"), read, "RGB")
    except (ImageCms.PyCMSError, OSError):
        return None


def _on_its_side(picture: Image.Image) -> bool:
    return picture.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)


def _reduce(picture: JpegImageFile, size: Size) -> None:
    """Have a JPEG decoded at 1/2, 1/4 or 1/8 of its size; twice the target is kept to antialias."""
    stored = 2 * size[1], 2 * size[0]  # pillow's order: width, height
    if _on_its_side(picture):
        stored = stored[::-1]
    picture.draft(None, stored)


def _cover(picture: Image.Image, size: Size, crop: tuple[float, float] | None) -> np.ndarray:
    """Resize a picture until it just covers `size`, and crop it at `crop` or the center.

    What is cropped away is not computed, though the filter looks beyond the crop.
    """
    height, width = size
    scale = max(width / picture.width, height / picture.height)
    seen = min(picture.height, height / scale), min(picture.width, width / scale)
    room = picture.height - seen[0], picture.width - seen[1]
    if scale == 1:  # whole pixels
        room = tuple(map(round, room))
        top, left = (n // 2 for n in room)
        if crop is not None:
            top, left = (int(at * (n + 1)) for at, n in zip(crop, room, strict=True))
        return np.asarray(picture.crop((left, top, left + width, top + height)))
    top, left = (at * n for at, n in zip(crop or (0.5, 0.5), room, strict=True))
    box = left, top, min(picture.width, left + seen[1]), min(picture.height, top + seen[0])
    return np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC, box=box))


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
