"""Training losses: an elementwise distance, its mean per sample, and the min-SNR weight.

Everything is float32, whatever the network computes in. imagen_pytorch.py, `Imagen.p_losses`.
"""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from imagen_jax.errors import UserError
from imagen_jax.types import AnyArray, LogSNR

Loss = Literal["l1", "l2", "huber"]
Objective = Literal["noise", "v", "x_start"]
Bins = Float[Array, "bins"]


def elementwise(
    prediction: Float[AnyArray, "*s"], target: Float[AnyArray, "*s"], loss_type: Loss
) -> Float[Array, "*s"]:
    """|e|, e^2, or Huber's e^2 / 2 up to |e| = 1 and |e| - 1/2 beyond (torch's smooth_l1)."""
    error = prediction.astype(jnp.float32) - target.astype(jnp.float32)
    match loss_type:
        case "l1":
            return jnp.abs(error)
        case "l2":
            return jnp.square(error)
        case "huber":
            size = jnp.abs(error)
            return jnp.where(size < 1.0, 0.5 * jnp.square(error), size - 0.5)
    raise UserError(f"loss_type must be 'l1', 'l2' or 'huber', got {loss_type!r}.")


def per_sample(
    prediction: Float[AnyArray, "b *dims"], target: Float[AnyArray, "b *dims"], loss_type: Loss
) -> Float[Array, "b"]:
    """The mean of `elementwise` over everything but the batch."""
    losses = elementwise(prediction, target, loss_type)
    return jnp.mean(losses, axis=tuple(range(1, losses.ndim)))


def min_snr_weight(
    log_snr: LogSNR, objective: Objective, gamma: float | Float[Array, ""] | None
) -> LogSNR:
    """The weight of a sample's loss (min-SNR, Hang et al. 2023), with k = min(snr, gamma).

    noise: k / snr; x_start: k; v: k / (snr + 1). `gamma=None` leaves k = snr, as the reference
    does with `min_snr_loss_weight` off: the weight is 1 for `noise` only.
    """
    snr = jnp.exp(log_snr.astype(jnp.float32))
    k = snr if gamma is None else jnp.minimum(snr, gamma)
    match objective:
        case "noise":
            return k / snr
        case "x_start":
            return k
        case "v":
            return k / (snr + 1.0)
    raise UserError(f"objective must be 'noise', 'v' or 'x_start', got {objective!r}.")


def binned(
    losses: Float[AnyArray, "b"], log_snr: LogSNR, edges: Float[AnyArray, "inner"]
) -> tuple[Bins, Bins]:
    """Sums of the losses, and their counts, in the log-SNR bins between ascending `edges`.

    n edges make n + 1 bins; the first and the last are open. Sums and counts of several batches
    add up; a bin's mean is sum / count.
    """
    bins = jnp.searchsorted(jnp.asarray(edges), log_snr, side="right")
    totals = jnp.stack([losses.astype(jnp.float32), jnp.ones_like(losses, jnp.float32)], axis=1)
    totals = jax.ops.segment_sum(totals, bins, num_segments=len(edges) + 1)
    return totals[:, 0], totals[:, 1]
