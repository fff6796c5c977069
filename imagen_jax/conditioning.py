"""Connects networks and theory: a network with its conditioning, as a callable of (x, level).

Training and sampling call the network only through this callable. The noise process defines x and
the level; the network is given the level's `conditioning`.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from imagen_jax.diffusion import guidance
from imagen_jax.diffusion.process import Level, Sample
from imagen_jax.nn import Network
from imagen_jax.types import PRNGKey


class Conditioning(NamedTuple):
    """Conditioning inputs of a stage's network that do not depend on the noise level of x.

    All have as many rows as x. `text` is the result of the network's `encode_text`.
    """

    text: Any = None
    lowres: Array | None = None
    lowres_time: Array | None = None
    """(b,) the network's input for the noise level of `lowres`."""
    cond_images: Array | None = None


class Condition(NamedTuple):
    """network(x, level, previous x_0) with its conditioning; `key` turns on dropout."""

    network: Network
    cond: Conditioning
    key: PRNGKey | None = None

    def __call__(self, x: Sample, level: Level, x0_previous: Sample | None = None) -> Array:
        return self.network(
            x,
            level.conditioning,
            text_cond=self.cond.text,
            lowres_cond_img=self.cond.lowres,
            lowres_noise_times=self.cond.lowres_time,
            cond_images=self.cond.cond_images,
            self_cond=x0_previous,
            key=self.key,
        ).astype(jnp.float32)


class Guided(NamedTuple):
    """Both halves of classifier-free guidance in one batch.

    Rows of `conditioned` come in pairs, with the text and without (or with the negative text), so
    that both halves of an image are on one device. Channels beyond those of x are a learned
    variance: the conditional one is taken as it is.
    """

    conditioned: Condition
    guidance: guidance.Guidance
    remove_parallel_component: bool

    def __call__(self, x: Sample, level: Level, x0_previous: Sample | None = None) -> Array:
        if self.guidance.interval is None:
            return self._both(x, level, x0_previous)
        return jax.lax.cond(
            jnp.any(self.guidance.inside(level)),
            lambda: self._both(x, level, x0_previous),
            lambda: self._alone(x, level, x0_previous),
        )

    def _alone(self, x: Sample, level: Level, x0_previous: Sample | None) -> Array:
        cond = jax.tree.map(lambda a: a[::2], self.conditioned.cond)
        return self.conditioned._replace(cond=cond)(x, level, x0_previous)

    def _both(self, x: Sample, level: Level, x0_previous: Sample | None) -> Array:
        twice = jax.tree.map(lambda a: jnp.repeat(a, 2, axis=0), (x, level, x0_previous))
        output = self.conditioned(*twice)
        pairs = output.reshape(-1, 2, *output.shape[1:])
        channels = x.shape[-1]
        guided = guidance.guide(
            pairs[:, 0, ..., :channels],
            pairs[:, 1, ..., :channels],
            self.guidance.scale_at(level),
            remove_parallel_component=self.remove_parallel_component,
            keep_parallel_frac=self.guidance.keep_parallel_frac,
        )
        if self.guidance.rescale is not None:
            cond = pairs[:, 0, ..., :channels]
            guided = guidance.rescale(guided, cond, self.guidance.rescale)
        return jnp.concatenate([guided, pairs[:, 0, ..., channels:]], axis=-1)
