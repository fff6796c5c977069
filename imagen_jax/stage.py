"""One stage of a cascade as static data: network, noise process, size, pre- and post-processing.

A stage is frozen and hashable: its compiled programs depend on its fields and on nothing else of
the cascade. Numbers that programs take as arguments are in `SamplingDefaults`.

Images are in [0, 1] outside a stage and in [-1, 1] inside it (`auto_normalize_img`).
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from imagen_jax.diffusion.process import PerSample, Process
from imagen_jax.diffusion.samplers import Options
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.resize import Mode
from imagen_jax.types import AnyArray, PRNGKey, Size
from imagen_jax.unet_config import NullUnetConfig, UnetConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRes:
    """The conditioning of a super-resolution stage on the image of the previous stage."""

    size: Size
    process: Process
    """Adds noise to it in training, and defines the network's input for the noise level."""
    sampling_process: Process
    """The same, in sampling."""
    per_sample: bool
    """In training: one noise level per image, instead of one for the batch."""
    noise_range: tuple[float, float] = (0.0, 1.0)
    """In training: the first and the last time that the noise level is drawn from."""

    def draw(self, key: PRNGKey, count: int) -> PerSample:
        """Times for training."""
        low, high = self.noise_range
        times = self.process.draw(key, count)
        return times if (low, high) == (0, 1) else low + (high - low) * times


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of an `ImagenConfig`, with its per-U-Net tuples resolved."""

    unet_number: int
    network: UnetConfig | IFUnetConfig | NullUnetConfig
    process: Process
    size: Size
    channels: int
    lowres: LowRes | None
    crop: Size | None
    """Size of the random crops of training."""
    condition_on_text: bool
    cond_drop_prob: float
    auto_normalize_img: bool
    resize_mode: Mode
    dynamic_thresholding: bool

    @property
    def sample_shape(self) -> tuple[int, ...]:
        """(h, w, c) of a generated image."""
        return (*self.size, self.channels)

    @property
    def trained_size(self) -> Size:
        """(h, w) of the images that the network is trained on."""
        return self.crop or self.size

    @property
    def value_range(self) -> tuple[float, float]:
        """The range of images outside the stage."""
        return (0.0 if self.auto_normalize_img else -1.0, 1.0)

    def normalize(self, images: Array) -> Array:
        """[0, 1] -> [-1, 1] if the configuration says so."""
        return images * 2 - 1 if self.auto_normalize_img else images

    def unnormalize(self, images: Array) -> Array:
        return (images + 1) * 0.5 if self.auto_normalize_img else images


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingDefaults:
    """The configuration's numbers for sampling a stage."""

    num_steps: int
    percentile: float
    most: float
    """The most that dynamic thresholding divides by."""
    lowres_noise_level: float
    """A time of the low-resolution process, in [0, 1]."""
    options: Options


def to_float(images: AnyArray) -> Array:
    """uint8 to float in [0, 1]; floats are returned unchanged."""
    images = jnp.asarray(images)
    return images.astype(jnp.float32) / 255 if images.dtype == jnp.uint8 else images


def show(size: Size) -> str:
    """A size as text, height first: `64 x 96`."""
    return f"{size[0]} x {size[1]}"
