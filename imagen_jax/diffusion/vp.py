"""The variance-preserving process in continuous time: the reference's `Imagen`.

Times run from 0 (data) to 1 (noise); a schedule maps them to log-SNRs, which are the positions of
the process and what the network is given. The network predicts the noise, x_0, or v:

    v = alpha eps - sigma x_0,   x_0 = alpha x - sigma v                                     (4)

(4): Progressive Distillation, Salimans & Ho 2022, Appendix D.
"""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.diffusion import grids, losses, schedules
from imagen_jax.diffusion.grids import Spacing
from imagen_jax.diffusion.losses import Objective
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
from imagen_jax.errors import UserError
from imagen_jax.types import PRNGKey

ALPHA_MIN = 1e-8
LOG_SNR_MIN = -10.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class VP:
    """A schedule and an objective. See `Process`.

    `min_snr_gamma` bounds the weight of the loss (`losses.min_snr_weight`).
    """

    schedule: schedules.Schedule = "cosine"
    objective: Objective = "noise"
    loss_type: losses.Loss = "l2"
    min_snr_gamma: float | None = 5.0

    sampler: ClassVar[str] = "ancestral"

    def draw(self, key: PRNGKey, count: int) -> PerSample:
        """Times, uniform in [0, 1)."""
        return jax.random.uniform(key, (count,))

    def training_level(self, draw: PerSample) -> Level:
        return self.level(schedules.log_snr(jnp.asarray(draw), self.schedule))

    def level(self, position: PerSample) -> Level:
        log_snr = jnp.asarray(position)
        return Level(*schedules.alpha_sigma(log_snr), log_snr, log_snr)

    def at(self, ratio: PerSample) -> Level:
        return self.level(-2 * jnp.log(ratio))

    def predict(self, network: Network, x: Sample, level: Level) -> Prediction:
        output = network(x, level).astype(x.dtype)
        x0 = x0_from_output(x, output, level, self.objective)
        eps = output if self.objective == "noise" else eps_from_x0(x, x0, level)
        return Prediction(x0, eps)

    def target(self, x0: Sample, noise: Sample, level: Level) -> Sample:
        """The noise, v of (4), or x_0."""
        match self.objective:
            case "noise":
                return noise
            case "v":
                return beside(level.alpha, x0) * noise - beside(level.sigma, x0) * x0
            case "x_start":
                return x0
        raise UserError(f"objective must be 'noise', 'v' or 'x_start', got {self.objective!r}.")

    def losses(self, network: Network, x0: Sample, noise: Sample, level: Level) -> PerSample:
        """imagen_pytorch.py, `Imagen.p_losses`."""
        output = network(q_sample(x0, level, noise), level)
        error = losses.per_sample(output, self.target(x0, noise, level), self.loss_type)
        return error * losses.min_snr_weight(level.log_snr, self.objective, self.min_snr_gamma)

    def grid(
        self,
        num_steps: int,
        *,
        spacing: Spacing | None = None,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
    ) -> Float[np.ndarray, "points"]:
        """log-SNRs at equal steps of time, or with another spacing from the log-SNR -10.2 up, below
        which the cosine schedule has almost no signal (Lu et al. 2022, Section 6.1)."""
        grids.refuse_range(sigma_min, sigma_max)
        if spacing in (None, "t"):
            return schedules.log_snr(time_grid(num_steps), self.schedule)
        low, high = schedules.log_snr(np.float32([1.0, 0.0]), self.schedule).tolist()
        found = grids.log_snrs(spacing, max(low, LOG_SNR_MIN), high, num_steps + 1)
        return found.astype(np.float32)

    def prior(self, noise: Sample, level: Level) -> Sample:
        """Noise of unit variance, wherever the grid starts, as in the reference."""
        return noise


def time_grid(num_steps: int) -> Float[np.ndarray, "points"]:
    """num_steps + 1 times from 1 to 0, with the roundings of `torch.linspace(1, 0, num_steps + 1)`.

    torch counts from both ends with a float32 step, the product and the sum rounded once.
    """
    step = np.float64(np.float32(1.0) / np.float32(num_steps))
    i = np.arange(num_steps + 1)
    times = np.where(i < (num_steps + 1) // 2, 1.0 - step * i, step * (num_steps - i))
    return times.astype(np.float32)


def x0_from_output(x: Sample, output: Sample, level: Level, objective: Objective) -> Array:
    """The estimate of x_0 in a network's output.

    For `noise` alpha is kept above 1e-8, as in the reference: at t = 1 of the cosine schedule it
    is 4.4e-8, and the estimate is enormous until it is thresholded.
    """
    alpha, sigma = beside(level.alpha, x), beside(level.sigma, x)
    match objective:
        case "noise":
            return (x - sigma * output) / jnp.maximum(alpha, ALPHA_MIN)
        case "v":
            return alpha * x - sigma * output
        case "x_start":
            return output
    raise UserError(f"objective must be 'noise', 'v' or 'x_start', got {objective!r}.")
