"""EDM: the reference's `ElucidatedImagen` (Karras et al., 2022).

    x = x_0 + sigma eps                                alpha = 1; positions are sigmas
    D(x; sigma) = c_skip x + c_out F(c_in x; c_noise)  the estimate of x_0

    c_skip = sd^2 / (sigma^2 + sd^2)                   c_in = 1 / sqrt(sigma^2 + sd^2)
    c_out  = sigma sd / sqrt(sigma^2 + sd^2)           c_noise = ln(sigma) / 4

with sd = sigma_data (Table 1). Training draws ln(sigma) ~ N(P_mean, P_std^2) and weights the
squared error of D by 1 / c_out^2; sampling runs over Karras' grid (Eq. 5), by default with Heun's
method and churn.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.diffusion import grids, losses
from imagen_jax.diffusion.grids import Spacing
from imagen_jax.diffusion.process import (
    Level,
    Network,
    PerSample,
    Prediction,
    Sample,
    beside,
    eps_from_x0,
    q_sample,
)
from imagen_jax.diffusion.vp import VP
from imagen_jax.errors import UserError
from imagen_jax.types import PRNGKey


@dataclasses.dataclass(frozen=True, kw_only=True)
class EDM:
    """Hyper-parameters by their names in the paper and the reference. See `Process`."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    rho: float = 7.0
    P_mean: float = -1.2
    P_std: float = 1.2

    sampler: ClassVar[str] = "heun"

    def draw(self, key: PRNGKey, count: int) -> PerSample:
        """Standard normal numbers."""
        return jax.random.normal(key, (count,))

    def training_level(self, draw: PerSample) -> Level:
        return self.level(jnp.exp(self.P_mean + self.P_std * jnp.asarray(draw)))

    def level(self, position: PerSample) -> Level:
        sigma = jnp.asarray(position)
        log_sigma = jnp.log(sigma)
        # elucidated_imagen.py, `c_noise`: the network never sees the log of zero.
        noise = 0.25 * jnp.log(jnp.maximum(sigma, 1e-20))
        return Level(jnp.ones_like(sigma), sigma, -2 * log_sigma, noise)

    def at(self, ratio: PerSample) -> Level:
        return self.level(ratio)

    def predict(self, network: Network, x: Sample, level: Level) -> Prediction:
        """elucidated_imagen.py, `preconditioned_network_forward`."""
        c_skip, c_out, c_in = self._preconditioning(x, level)
        x0 = c_skip * x + c_out * network(c_in * x, level).astype(x.dtype)
        return Prediction(x0, eps_from_x0(x, x0, level))

    def target(self, x0: Sample, noise: Sample, level: Level) -> Sample:
        """F of a perfect D."""
        x = q_sample(x0, level, noise)
        c_skip, c_out, _ = self._preconditioning(x, level)
        return (x0 - c_skip * x) / c_out

    def losses(self, network: Network, x0: Sample, noise: Sample, level: Level) -> PerSample:
        """elucidated_imagen.py, `ElucidatedImagen.forward`."""
        estimate = self.predict(network, q_sample(x0, level, noise), level).x0
        sd, sigma = self.sigma_data, level.sigma
        return losses.per_sample(estimate, x0, "l2") * (sigma**2 + sd**2) / (sigma * sd) ** 2

    def grid(
        self,
        num_steps: int,
        *,
        spacing: Spacing | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> Float[np.ndarray, "points"]:
        """Sigmas from sigma_max to sigma_min, then 0; by default Karras',
        (sigma_max^(1/rho) + i / (N - 1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho."""
        low = self.sigma_min if sigma_min is None else sigma_min
        high = self.sigma_max if sigma_max is None else sigma_max
        if not 0 < low <= high:
            raise UserError(f"sigma_min = {low} must be in (0, sigma_max = {high}].")
        if spacing == "t":
            raise UserError("spacing 't': elucidated cascades have no time, use log_snr or karras.")
        if spacing not in (None, "karras"):
            ends = -2 * np.log(high), -2 * np.log(low)
            sigmas = np.exp(-grids.log_snrs(spacing, *ends, num_steps) / 2)
            return np.append(sigmas, 0).astype(np.float32)
        i = np.arange(num_steps, dtype=np.float32) / np.float32(max(num_steps - 1, 1))
        first, last = high ** (1 / self.rho), low ** (1 / self.rho)
        sigmas = (np.float32(first) + i * np.float32(last - first)) ** np.float32(self.rho)
        return np.append(sigmas, 0).astype(np.float32)

    def prior(self, noise: Sample, level: Level) -> Sample:
        """Noise scaled to the first level. (The reference starts from sigma_max even where
        `skip_steps` starts later.)"""
        return beside(level.sigma, noise) * noise

    def _preconditioning(self, x: Sample, level: Level) -> tuple[Array, Array, Array]:
        sigma, sd = beside(level.sigma, x), self.sigma_data
        total = sigma**2 + sd**2
        return sd**2 / total, sigma * sd * jax.lax.rsqrt(total), jax.lax.rsqrt(total)


@dataclasses.dataclass(frozen=True, kw_only=True)
class RawTimeVP(VP):
    """The low-resolution process as the reference's elucidated cascades use it in sampling: the
    network is given the time itself, although training gave it the log-SNR (a bug in
    elucidated_imagen.py)."""

    def training_level(self, draw: PerSample) -> Level:
        return super().training_level(draw)._replace(conditioning=jnp.asarray(draw))
