"""Spacings of sampling grids, in log-SNR, for processes to choose from.

    log_snr   equal steps of the log-SNR (DPM-Solver, Lu et al. 2022)
    karras    equal steps of (sigma / alpha)^(1 / rho) (Karras et al. 2022, Eq. 5)
    a list    sigma / alpha of every level, descending, like diffusers' `sigmas`

`t`, equal steps of time, belongs to processes that have a time.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from imagen_jax.errors import UserError

Spacing = str | tuple[float, ...]
RHO = 7.0
SPACINGS = ("t", "log_snr", "karras")


def refuse_range(sigma_min: float | None, sigma_max: float | None) -> None:
    """Raises UserError if a noise range is given to a process whose schedule has its own."""
    if sigma_min is not None or sigma_max is not None:
        raise UserError(
            "sigma_min and sigma_max are for elucidated cascades; this one has a schedule."
        )


def log_snrs(
    spacing: str | Sequence[float], low: float, high: float, count: int
) -> Float[np.ndarray, "count"]:
    """`count` log-SNRs, ascending from `low` to `high`; for a list, those of its levels.

    Raises UserError for an unknown spacing, or a list that is not descending or has another length.
    """
    if spacing == "log_snr":
        return np.linspace(low, high, count)
    if spacing == "karras":
        first, last = (np.exp(-end / 2) ** (1 / RHO) for end in (low, high))
        return -2 * RHO * np.log(np.linspace(first, last, count))
    if isinstance(spacing, str):
        raise UserError(f"spacing {spacing!r} is not one of {', '.join(SPACINGS)} or a list.")
    ratios = np.asarray(spacing, np.float64)
    if ratios.shape != (count,):
        raise UserError(f"spacing has {ratios.size} levels where {count} are needed.")
    if not (np.all(ratios > 0) and np.all(np.diff(ratios) < 0) and np.isfinite(ratios).all()):
        raise UserError(f"spacing must be decreasing and above 0: {list(map(float, ratios))}.")
    return -2 * np.log(ratios)
