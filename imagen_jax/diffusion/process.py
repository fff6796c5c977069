"""Noise levels, predictions, and the protocol of a noise process.

A level scales a sample x_0 and the noise eps, with one pair of numbers per sample:

    x = alpha x_0 + sigma eps,    log-SNR l = 2 log(alpha / sigma)                           (1)

Variance-preserving processes have alpha^2 + sigma^2 = 1, EDM has alpha = 1. For every process, the
posterior between two levels, l' > l being the less noisy one, and the way back from it (RePaint)
follow from (1) alone:

    q(x' | x, x_0) = N(alpha' (x (1 - c) / alpha + c x_0), sigma'^2 c),   c = -expm1(l - l')  (2)
    q(x | x')      = N((alpha / alpha') x', sigma^2 c)                                       (3)

(1), (2): Variational Diffusion Models, Kingma et al. 2021, Eq. 1 and 32-33. Arrays are `b *dims`,
images and videos alike.

A process is a frozen, hashable dataclass. It defines its schedule or its distribution of noise
levels, the preconditioning of the network, the objective, the weight of the loss, and its sampling
grid. A network is passed as a callable of (x, level) and returns whatever the objective asks for.
"""

from collections.abc import Callable
from typing import ClassVar, Literal, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.diffusion.grids import Spacing
from imagen_jax.errors import UserError
from imagen_jax.types import AnyArray, PRNGKey

Sample = Float[AnyArray, "b *dims"]
PerSample = Float[AnyArray, "b"]
RenoiseVariance = Literal["exact", "reference"]


class Level(NamedTuple):
    """One noise level per sample. See (1).

    `log_snr` is kept beside the scales, since it cannot be recovered from them once they are
    rounded. `conditioning` is what the network is given for the level.
    """

    alpha: PerSample
    sigma: PerSample
    log_snr: PerSample
    conditioning: PerSample


class Prediction(NamedTuple):
    """A network's estimates at a level, consistent with (1): x = alpha x0 + sigma eps."""

    x0: Sample
    eps: Sample
    fraction: Sample | None = None
    """From networks that learn the variance of a step: where its logarithm lies between those of
    `posterior_bounds`, from 0 to 1."""


Network = Callable[[Sample, Level], Array]
"""network(x, level) -> its raw output: the channels of x, and those of a learned variance."""


@runtime_checkable
class Process(Protocol):
    """A noise process. `VP` is the reference's `GaussianDiffusionContinuousTimes`."""

    sampler: ClassVar[str]
    """Name of the process's default sampler."""

    def draw(self, key: PRNGKey, count: int) -> PerSample:
        """Random numbers that decide the levels of training, as `training_level` takes them."""

    def training_level(self, draw: PerSample) -> Level: ...

    def level(self, position: PerSample) -> Level:
        """The level at a position of the process: its own coordinate, in which `grid` is given."""

    def at(self, ratio: PerSample) -> Level:
        """The level at a ratio sigma / alpha."""

    def predict(self, network: Network, x: Sample, level: Level) -> Prediction:
        """The network's estimates at x. Preconditioning happens here and in `losses`."""

    def target(self, x0: Sample, noise: Sample, level: Level) -> Sample:
        """What the network should output; the inverse of `predict`."""

    def losses(self, network: Network, x0: Sample, noise: Sample, level: Level) -> PerSample:
        """Weighted loss of each sample, in float32."""

    def grid(
        self,
        num_steps: int,
        *,
        spacing: Spacing | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> Float[np.ndarray, "points"]:
        """num_steps + 1 positions, from noise to data; `spacing` is one from grids.py, None the
        process's own. Raises UserError for a range or spacing that the process does not support."""

    def prior(self, noise: Sample, level: Level) -> Sample:
        """What sampling starts from at the first level of its grid."""


def q_sample(x0: Sample, level: Level, noise: Sample) -> Sample:
    """x of (1)."""
    return beside(level.alpha, x0) * x0 + beside(level.sigma, x0) * noise


def eps_from_x0(x: Sample, x0: Sample, level: Level) -> Sample:
    """The eps that leads from x_0 to x in (1)."""
    return (x - beside(level.alpha, x) * x0) / beside(level.sigma, x)


def posterior_bounds(level: Level, less_noisy: Level) -> tuple[PerSample, PerSample]:
    """Logarithms of the variances of (2) and (3), at least 1e-20: the smallest and the largest that
    a step can have (Nichol & Dhariwal 2021, Section 3.1)."""
    c = -jnp.expm1(level.log_snr - less_noisy.log_snr)
    short, long = less_noisy.sigma**2 * c, level.sigma**2 * c
    return jnp.log(jnp.maximum(short, 1e-20)), jnp.log(jnp.maximum(long, 1e-20))


def posterior(x: Sample, x0: Sample, level: Level, less_noisy: Level) -> tuple[Sample, Array]:
    """Mean and log variance of (2); the variance is at least 1e-20.

    imagen_pytorch.py, `GaussianDiffusionContinuousTimes.q_posterior`.
    """
    c = -jnp.expm1(level.log_snr - less_noisy.log_snr)
    kept, variance = beside(c, x), beside(less_noisy.sigma**2 * c, x)
    mean = beside(less_noisy.alpha, x) * (x * (1.0 - kept) / beside(level.alpha, x) + kept * x0)
    return mean, jnp.log(jnp.maximum(variance, 1e-20))


def renoise(
    x: Sample, level: Level, noisier: Level, noise: Sample, *, variance: RenoiseVariance = "exact"
) -> Sample:
    """A draw from (3): takes x back to the noisier level (RePaint, Lugmayr et al. 2022).

    `reference` adds noise by the difference of the standard deviations, not by the root of the
    difference of the variances (imagen_pytorch.py, `q_sample_from_to`), which is too little.
    """
    match variance:
        case "exact":
            std = noisier.sigma * jnp.sqrt(-jnp.expm1(noisier.log_snr - level.log_snr))
        case "reference":
            std = (noisier.sigma * level.alpha - level.sigma * noisier.alpha) / level.alpha
        case _:
            raise UserError(f"variance must be 'exact' or 'reference', got {variance!r}.")
    return x * beside(noisier.alpha / level.alpha, x) + noise * beside(std, x)


def beside(per_sample: PerSample, x: Sample) -> Float[Array, "b *ones"]:
    """(b,) as (b, 1, ..., 1), to scale the samples of x."""
    return jnp.asarray(per_sample).reshape(-1, *(1,) * (x.ndim - 1))
