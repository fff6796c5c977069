"""Interpolation exactly as torch's `F.interpolate` does it (align_corners off, no antialiasing).

Every mode is separable: each axis is multiplied by a small matrix of weights, which NumPy computes
at trace time; `nearest` repeats or selects pixels instead. `jax.image.resize` differs: its nearest
samples at pixel centres, and its linear and cubic modes antialias when downsampling.
"""

import functools
from typing import Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, Shaped

from imagen_jax.errors import UserError
from imagen_jax.types import AnyArray, Size, pair

Mode = Literal["nearest", "bilinear", "bicubic", "area", "bilinear_corners"]


def resize(
    image: Shaped[AnyArray, "b h w c"],
    size: int | Size,
    *,
    mode: Mode = "nearest",
    clamp: tuple[float, float] | None = None,
) -> Shaped[AnyArray, "b h_out w_out c"]:
    """The image at (height, width) = `size`, clipped to `clamp`; one integer means a square.

    As in the reference (`resize_image_to`), an image that already has this size is returned
    unchanged and unclipped. (The reference compares the widths only, so it returns a 32x64 image
    unchanged when asked for 64x64; this function resizes it.) `nearest` takes any dtype, the other
    modes floats. Raises ValueError for an unknown mode or an empty size.
    """
    h, w = pair(size)
    if min(h, w) < 1:
        raise UserError(f"size = {size} must be positive.")
    h_in, w_in = image.shape[1:3]
    if (h_in, w_in) == (h, w):
        return image
    if mode == "nearest":
        out = _nearest(_nearest(jnp.asarray(image), h, axis=1), w, axis=2)
    else:
        rows, columns = weights(h_in, h, mode), weights(w_in, w, mode)
        out = jnp.einsum("yh,bhwc->bywc", rows, image, precision=lax.Precision.HIGHEST)
        out = jnp.einsum("xw,bywc->byxc", columns, out, precision=lax.Precision.HIGHEST)
        out = out.astype(image.dtype)
    return out if clamp is None else jnp.clip(out, *clamp)


def _nearest(image: Shaped[jax.Array, "b h w c"], n_out: int, *, axis: int) -> jax.Array:
    """One axis of `nearest`: a repeat or a strided slice where those select torch's pixels.

    Both are cheaper than a gather, and the gradient of a repeat is a sum, not a scatter. A multiple
    is not enough for a repeat: torch's float32 rounding makes 3 -> 123 irregular.
    """
    n_in = image.shape[axis]
    indices = nearest_indices(n_in, n_out)
    if n_in % n_out == 0:
        return lax.slice_in_dim(image, 0, n_in, n_in // n_out, axis)
    if n_out % n_in == 0 and np.array_equal(indices, np.arange(n_in).repeat(n_out // n_in)):
        return jnp.repeat(image, n_out // n_in, axis=axis)
    return jnp.take(image, indices, axis=axis, mode="clip", indices_are_sorted=True)


def nearest_indices(n_in: int, n_out: int) -> np.ndarray:
    """floor(i n_in / n_out), with torch's float32 roundings."""
    scale = np.float32(n_in) / np.float32(n_out)
    return np.minimum(np.floor(np.arange(n_out, dtype=np.float32) * scale).astype(int), n_in - 1)


@functools.cache
def weights(n_in: int, n_out: int, mode: Mode) -> Float[np.ndarray, "n_out n_in"]:
    """One axis of a mode as a matrix: `bicubic` is Keys' kernel with a = -0.75, `bilinear_corners`
    upsamples with aligned corners (DeepFloyd IF) and downsamples by area."""
    match mode:
        case "bilinear":
            return _gather(np.maximum(_centres(n_in, n_out), 0.0), n_in, _linear)
        case "bicubic":
            return _gather(_centres(n_in, n_out), n_in, _cubic)
        case "area":
            return _area(n_in, n_out)
        case "bilinear_corners":
            if n_out < n_in:
                return _area(n_in, n_out)
            return _gather(np.linspace(0, n_in - 1, n_out, dtype=np.float32), n_in, _linear)
    raise UserError(f"mode = {mode!r} is not one of {', '.join(get_args(Mode))}.")


def _centres(n_in: int, n_out: int) -> np.ndarray:
    """The centre of each output pixel, in input pixels."""
    scale = np.float32(n_in) / np.float32(n_out)
    return scale * (np.arange(n_out, dtype=np.float32) + np.float32(0.5)) - np.float32(0.5)


def _gather(at: np.ndarray, n_in: int, kernel) -> np.ndarray:
    """Weights of the kernel's taps around `at`; taps beyond the edge use the edge pixel."""
    first = np.floor(at)
    matrix = np.zeros((len(at), n_in), np.float32)
    for tap, weight in kernel(at - first):
        pixel = np.clip(first + tap, 0, n_in - 1).astype(int)
        np.add.at(matrix, (np.arange(len(at)), pixel), weight)
    return matrix


def _linear(t: np.ndarray):
    return (0, 1 - t), (1, t)


def _cubic(t: np.ndarray, a: float = -0.75):
    def near(x):
        return ((a + 2) * x - (a + 3)) * x * x + 1

    def far(x):
        return ((a * x - 5 * a) * x + 8 * a) * x - 4 * a

    return (-1, far(t + 1)), (0, near(t)), (1, near(1 - t)), (2, far(2 - t))


def _area(n_in: int, n_out: int) -> np.ndarray:
    """Means over [floor(i n_in / n_out), ceil((i + 1) n_in / n_out)): adaptive average pooling."""
    i, pixel = np.arange(n_out)[:, None], np.arange(n_in)
    inside = (pixel >= i * n_in // n_out) & (pixel < -(-(i + 1) * n_in // n_out))
    return (inside / inside.sum(axis=1, keepdims=True)).astype(np.float32)
