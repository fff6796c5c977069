"""Configurations of two kinds of diffusion besides that of the reference's `Imagen`: EDM, and
discrete steps.

A field takes one value, or one per U-Net, and keeps the form in which it was given.
"""

import dataclasses
from typing import Any, Literal

from imagen_jax.diffusion.discrete import Betas, Discrete
from imagen_jax.diffusion.edm import EDM
from imagen_jax.diffusion.losses import Loss
from imagen_jax.diffusion.samplers import Options
from imagen_jax.errors import UserError
from imagen_jax.fields import Config

Real = int | float  # the reference's config class has integers where both make sense


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElucidatedConfig(Config):
    """Hyper-parameters of the reference's `ElucidatedImagen` (Karras et al., 2022).

    `lowres_conditioning` is not in the reference: it selects what super-resolution is given, in
    sampling, for the noise level of the low-resolution image. `log_snr` is the same as in training;
    `time` repeats a mistake of the reference, to reproduce its images.
    """

    num_sample_steps: int | tuple[int, ...] = 32
    sigma_min: Real | tuple[Real, ...] = 0.002
    sigma_max: Real | tuple[Real, ...] = 80
    sigma_data: Real | tuple[Real, ...] = 0.5
    rho: Real | tuple[Real, ...] = 7
    P_mean: Real | tuple[Real, ...] = -1.2
    P_std: Real | tuple[Real, ...] = 1.2
    S_churn: Real | tuple[Real, ...] = 80
    S_tmin: Real | tuple[Real, ...] = 0.05
    S_tmax: Real | tuple[Real, ...] = 50
    S_noise: Real | tuple[Real, ...] = 1.003
    lowres_conditioning: Literal["log_snr", "time"] = "log_snr"

    def __post_init__(self):
        self._check_types()

    def process(self, i: int) -> EDM:
        """The noise process of U-Net i (from 0)."""
        return EDM(**self._numbers(i, *(field.name for field in dataclasses.fields(EDM))))

    def options(self, i: int) -> Options:
        """The default options of Heun's sampler for U-Net i."""
        return Options(**self._numbers(i, "S_churn", "S_tmin", "S_tmax", "S_noise"))

    def _numbers(self, i: int, *names: str) -> dict[str, float]:
        return {name: float(of_stage(getattr(self, name), i)) for name in names}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiscreteConfig(Config):
    """Diffusion in discrete steps, as in DeepFloyd IF (diffusion/discrete.py), with diffusers'
    names.

    The noise on low-resolution images uses the first of the `betas`. `sample_max_value` is the most
    that dynamic thresholding divides by (1.5 and 1.0 in IF).
    """

    betas: Betas | tuple[Betas, ...] = "squaredcos_cap_v2"
    num_train_timesteps: int = 1000
    sample_max_value: float | tuple[float, ...] = 1.5

    def __post_init__(self):
        self._check_types()
        if self.num_train_timesteps < 2:
            raise UserError(f"num_train_timesteps = {self.num_train_timesteps} must be at least 2.")
        values = self.sample_max_value
        if min(values if isinstance(values, tuple) else (values,)) < 1:
            raise UserError(f"sample_max_value = {values} must be at least 1.")

    def process(
        self, i: int, *, learned_variance: bool = False, loss_type: Loss = "l2"
    ) -> Discrete:
        """The noise process of U-Net i (from 0)."""
        return Discrete(
            betas=of_stage(self.betas, i),
            steps=self.num_train_timesteps,
            learned_variance=learned_variance,
            loss_type=loss_type,
        )


def of_stage(value: Any, i: int) -> Any:
    """The value of a field for U-Net i (from 0)."""
    return value[i] if isinstance(value, tuple) else value
