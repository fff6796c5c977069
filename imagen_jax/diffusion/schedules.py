"""Noise schedules: functions from a time t in [0, 1] (0 is data, 1 is noise) to the log-SNR l.

Everything else about the forward process follows from l = log(alpha^2 / sigma^2) alone:

    x_t = alpha x_0 + sigma eps,   alpha^2 = sigmoid(l),   sigma^2 = sigmoid(-l)

The two schedules are the reference's, evaluated in float32 in the reference's order of operations:
near both ends the cosine amplifies rounding a thousandfold, the network is given l itself, and so
the rounding is part of what a trained checkpoint has seen.
"""

import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from imagen_jax.errors import UserError
from imagen_jax.types import AnyArray

Schedule = Literal["cosine", "linear"]

COS_FLOOR = 4.3711388e-8  # |cos| of float32's pi / 2; keeps l(1) = -33.89 whatever the hardware


def log_snr(
    t: Float[AnyArray, "*s"] | float, schedule: Schedule
) -> Float[AnyArray | np.floating, "*s"]:
    """log-SNR at the times t, in float32; computed by NumPy on the host unless t is a JAX array.

    imagen_pytorch.py, `alpha_cosine_log_snr` and `beta_linear_log_snr`. The cosine ends at
    l(0) = 8.77 and, because float32's pi / 2 is not quite pi / 2, at l(1) = -33.89; the linear one
    at 9.21 and -10. Raises ValueError for an unknown schedule.
    """
    xp = jnp if isinstance(t, jax.Array) else np
    t = xp.asarray(t, dtype=np.float32)
    match schedule:
        case "cosine":
            angle = (t + 0.008) / 1.008 * math.pi * 0.5
            cos = xp.maximum(xp.abs(xp.cos(angle)), COS_FLOOR)
            return -xp.log(xp.maximum(1.0 / (cos * cos) - 1.0, 1e-5))
        case "linear":
            return -xp.log(xp.expm1(1e-4 + 10.0 * (t * t)))
    raise UserError(f"schedule = {schedule!r} is neither 'cosine' nor 'linear'.")


def alpha_sigma(log_snr: Float[AnyArray, "*s"]) -> tuple[Float[Array, "*s"], Float[Array, "*s"]]:
    """Signal and noise scales; sigmoids, so neither under- nor overflows."""
    return jnp.sqrt(jax.nn.sigmoid(log_snr)), jnp.sqrt(jax.nn.sigmoid(-log_snr))
