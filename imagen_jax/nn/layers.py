"""Primitives of the U-Net: PyTorch's initialisation, the reference's norms and resampling layers.

Parameters are float32; a layer computes in `dtype`. Norms compute their statistics in float32 and
cast back.
"""

import math

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from imagen_jax.errors import UserError
from imagen_jax.sharding import constrain, model_parallel, platform, splits
from imagen_jax.types import AnyArray, PRNGKey

torch_kernel_init = nnx.initializers.variance_scaling(1 / 3, "fan_in", "uniform")
"""U(-1/sqrt(fan_in), 1/sqrt(fan_in)), the initialisation of `torch.nn.Linear` and `Conv2d`."""


def torch_bias_init(fan_in: int):
    """The initialiser of a PyTorch layer's bias: uniform, with the same bound as the kernel."""
    bound = 1 / math.sqrt(fan_in)

    def init(key, shape, dtype=jnp.float32, out_sharding=None):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(
    c_in: int,
    c_out: int,
    *,
    use_bias: bool = True,
    kernel_init=torch_kernel_init,
    bias_init=None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """`torch.nn.Linear`, its kernel stored as (c_in, c_out)."""
    return Linear(
        c_in,
        c_out,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init or torch_bias_init(c_in),
        dtype=dtype,
        rngs=rngs,
    )


def conv(
    c_in: int,
    c_out: int,
    size: int,
    *,
    stride: int = 1,
    groups: int = 1,
    use_bias: bool = True,
    kernel_init=torch_kernel_init,
    bias_init=None,
    dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    """`torch.nn.Conv2d`, zero-padded by (size - stride) // 2: same size, or half at stride 2."""
    pad = (size - stride) // 2
    return (Pointwise if size == 1 else nnx.Conv)(
        c_in,
        c_out,
        (size, size),
        strides=stride,
        padding=((pad, pad), (pad, pad)),
        feature_group_count=groups,
        use_bias=use_bias,
        kernel_init=kernel_init,
        bias_init=bias_init or torch_bias_init(c_in // groups * size * size),
        dtype=dtype,
        rngs=rngs,
    )


class Linear(nnx.Linear):
    """A linear layer as a product of two matrices. The gradient of its kernel is then one too,
    without a transpose (which on a CPU took a tenth of a training step)."""

    def __call__(self, x: Float[Array, "*s c_in"]) -> Float[Array, "*s c_out"]:
        return _product(x, self.kernel[...], self.bias, self.dtype)


class Pointwise(nnx.Conv):
    """A 1 x 1 convolution, computed as a matrix product.

    On a TPU, XLA's convolution does the same; on a CPU, the gradient of its kernel is several times
    slower.
    """

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h w c_out"]:
        return _product(x, self.kernel[...][0, 0], self.bias, self.dtype)


def _product(
    x: Float[Array, "*s c_in"],
    kernel: Float[Array, "c_in c_out"],
    bias: nnx.Param | None,
    dtype: DTypeLike,
) -> Float[Array, "*s c_out"]:
    shape, x = x.shape, x.astype(dtype)
    # With a model axis, rows may be split over it, and merging them with the axes before them (the
    # frames of a video) would gather them. A layer does not know its axes, so it merges none then.
    flat = x if model_parallel() else x.reshape(-1, shape[-1])
    y = (flat @ kernel.astype(dtype)).reshape(*shape[:-1], kernel.shape[-1])
    return y if bias is None else y + bias[...].astype(dtype)


def l2norm(x: Float[Array, "*s d"], gain: Array) -> Float[Array, "*s d"]:
    """Scales `x` to unit length along the last axis, times `gain`; norms are clamped to at least
    1e-12, as in torch. Computed in float32 and rounded once."""
    x32 = x.astype(jnp.float32)
    # Clamps the square, not the root, whose gradient at zero would be infinite.
    square = jnp.maximum(jnp.sum(x32 * x32, axis=-1, keepdims=True), 1e-24)
    return (x32 * jax.lax.rsqrt(square) * gain).astype(x.dtype)


class RMSNorm(nnx.Module):
    """x / ||x|| * sqrt(c) * gamma over the channels (reference `ChanRMSNorm`)."""

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.gamma = nnx.Param(jnp.ones((dim,)))

    def __call__(self, x: Float[Array, "*s c"]) -> Float[Array, "*s c"]:
        return l2norm(x, self.gamma[...] * math.sqrt(x.shape[-1]))


class LayerNorm(nnx.Module):
    """Layer norm with a gain and no bias (reference `LayerNorm` and `ChanLayerNorm`).

    eps is 1e-5 in every dtype. The reference uses 1e-3 in half precision, where it also computes
    the variance in half precision; here the variance is float32.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.g = nnx.Param(jnp.ones((dim,)))

    def __call__(self, x: Float[Array, "*s c"]) -> Float[Array, "*s c"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        return (centred * jax.lax.rsqrt(variance + 1e-5) * self.g[...]).astype(x.dtype)


def affine_layer_norm(dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """`torch.nn.LayerNorm`: a gain and a bias."""
    return nnx.LayerNorm(dim, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs)


def block_norm(kind: str, dim: int, *, dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Module:
    """The norm of a convolution block: "rms", or "group" (8 groups; the reference before 2.0)."""
    if kind == "rms":
        return RMSNorm(dim, rngs=rngs)
    return nnx.GroupNorm(
        dim, num_groups=8, epsilon=1e-5, use_fast_variance=False, dtype=dtype, rngs=rngs
    )


class FourierFeatures(nnx.Module):
    """A scalar as [x, sin(2 pi w x), cos(2 pi w x)] with learned frequencies w, in float32.

    Reference `LearnedSinusoidalPosEmb`. Log-SNRs go up to 30: half precision would lose the phase.
    """

    def __init__(self, dim: int, *, rngs: nnx.Rngs):
        self.weights = nnx.Param(jax.random.normal(rngs.params(), (dim // 2,)))

    def __call__(self, x: Float[AnyArray, "b"]) -> Float[Array, "b d"]:
        x = jnp.asarray(x, jnp.float32)[:, None]
        angles = x * self.weights[...] * 2 * math.pi
        return jnp.concatenate([x, jnp.sin(angles), jnp.cos(angles)], axis=-1)


class CrossEmbed(nnx.Module):
    """Convolutions of several kernel sizes side by side (reference `CrossEmbedLayer`).

    The smallest kernel gets half the channels, each next one half as many, the last the rest.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_sizes: tuple[int, ...],
        *,
        stride: int,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        sizes = sorted(kernel_sizes)
        widths = [c_out // 2**i for i in range(1, len(sizes))]
        widths.append(c_out - sum(widths))
        self.convs = nnx.List(
            conv(c_in, width, size, stride=stride, dtype=dtype, rngs=rngs)
            for size, width in zip(sizes, widths, strict=True)
        )

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h2 w2 c_out"]:
        # Concatenating sharded parts would have to redistribute all channels.
        x = constrain(x, "b h w _")
        parts = [constrain(conv(x), "b h w _") for conv in self.convs]
        return constrain(jnp.concatenate(parts, axis=-1), "b h w c")


class PixelUnshuffle(nnx.Module):
    """Halves the resolution: every 2 x 2 pixels become channels, then a 1 x 1 convolution.

    Reference `Downsample`. Both steps are computed as one 2 x 2 convolution with stride 2, which
    needs no transpose of the pixels. The kernel is stored as in the reference, with its inputs
    ordered (c, row, column). This order is required: a reshape must not give a sharded axis a
    leading factor of 2.
    """

    def __init__(self, c_in: int, c_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.conv = conv(4 * c_in, c_out, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h2 w2 c_out"]:
        kernel = self.conv.kernel[...][0, 0].astype(self.conv.dtype)
        y = jax.lax.conv_general_dilated(
            x.astype(self.conv.dtype),
            rearrange(kernel, "(c i j) o -> i j c o", i=2, j=2),
            window_strides=(2, 2),
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return constrain(y + self.conv.bias[...].astype(y.dtype), "b h w c")


class PixelShuffle(nnx.Module):
    """Doubles the resolution: 1 x 1 convolution, SiLU, then 4 channels become 2 x 2 pixels.

    Reference `PixelShuffleUpsample`, initialised like it to four equal copies (no checkerboard).
    On a TPU the first and last steps are one transposed convolution, its kernel reshaped as in
    `PixelUnshuffle`: at most half the bytes. On a CPU the gradient of that takes 20 times longer.
    """

    def __init__(self, c_in: int, c_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        def four_copies(key, shape, dtype=jnp.float32, out_sharding=None):
            quarter = nnx.initializers.he_uniform()(key, (*shape[:-1], c_out), dtype)
            return jnp.repeat(quarter, 4, axis=-1)

        self.c_out = c_out
        self.conv = conv(
            c_in,
            4 * c_out,
            1,
            kernel_init=four_copies,
            bias_init=nnx.initializers.zeros_init(),
            dtype=dtype,
            rngs=rngs,
        )

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h2 w2 c_out"]:
        x = constrain(x, "b h w _")
        if platform() == "tpu":
            return constrain(nnx.silu(self._transposed(x)), "b h w c")
        x = nnx.silu(self.conv(x))
        x = constrain(x, "b h w c" if splits(self.c_out) else "b h w _")
        return constrain(rearrange(x, "b h w (c i j) -> b (h i) (w j) c", i=2, j=2), "b h w c")

    def _transposed(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h2 w2 c_out"]:
        dtype = self.conv.dtype
        kernel = self.conv.kernel[...][0, 0].astype(dtype)
        y = jax.lax.conv_general_dilated(
            x.astype(dtype),
            rearrange(kernel, "d (c i j) -> i j d c", i=2, j=2)[::-1, ::-1],
            window_strides=(1, 1),
            padding=((1, 1), (1, 1)),
            lhs_dilation=(2, 2),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        bias = rearrange(self.conv.bias[...].astype(dtype), "(c i j) -> i j c", i=2, j=2)
        h, w = y.shape[1:3]
        below = jax.lax.broadcasted_iota(jnp.int32, (h, w, 1), 0) % 2 == 1
        right = jax.lax.broadcasted_iota(jnp.int32, (h, w, 1), 1) % 2 == 1
        top, bottom = (jnp.where(right, pair[1], pair[0]) for pair in bias)
        return y + jnp.where(below, bottom, top)


class NearestUpsample(nnx.Module):
    """Doubles the resolution by repeating pixels, then a 3 x 3 convolution."""

    def __init__(self, c_in: int, c_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.project = conv(c_in, c_out, 3, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h2 w2 c_out"]:
        x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return constrain(self.project(x), "b h w c")


class ConvPair(nnx.Module):
    """The sum of a 3 x 3 and a 1 x 1 convolution, after the last level down (`Parallel`)."""

    def __init__(self, c_in: int, c_out: int, *, dtype: DTypeLike, rngs: nnx.Rngs):
        self.wide = conv(c_in, c_out, 3, dtype=dtype, rngs=rngs)
        self.point = conv(c_in, c_out, 1, dtype=dtype, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c_in"]) -> Float[Array, "b h w c_out"]:
        return constrain(self.wide(x) + self.point(x), "b h w c")


def check_image(x: AnyArray, *, channels: int, multiple: int) -> None:
    """Raises UserError for a noisy image that does not fit a U-Net: it must have `channels`
    channels, and sides that are multiples of `multiple`."""
    if x.shape[-1] != channels:
        raise UserError(f"x has {x.shape[-1]} channels; this U-Net takes {channels}.")
    if any(size % multiple for size in x.shape[1:3]):
        raise UserError(
            f"x is {x.shape[1]} x {x.shape[2]} pixels; this U-Net needs multiples of {multiple}."
        )


def dropout(x: Float[Array, "*s"], rate: float, key: PRNGKey | None) -> Float[Array, "*s"]:
    """Zeroes entries with probability `rate` and scales up the rest; the identity without a key."""
    if key is None:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), 0)
