"""A stage's loss by noise level on given images, for comparing runs."""

import functools
from collections.abc import Callable

import jax
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array

from imagen_jax import nn, training
from imagen_jax.compiling import compiler_options
from imagen_jax.diffusion import losses
from imagen_jax.sharding import Layout, single
from imagen_jax.stage import Stage
from imagen_jax.types import Params, PRNGKey

LOG_SNR_EDGES = np.arange(-10.0, 10.1, 2.5, dtype=np.float32)
"""The edges of the evaluation's bins; the first and the last bin are open."""


def bin_labels() -> list[str]:
    """Names of the log-SNR bins: `..-10`, `-10..-7.5`, ..., `10..`."""
    edges = [f"{edge:g}" for edge in LOG_SNR_EDGES]
    return [f"{a}..{b}" for a, b in zip(["", *edges], [*edges, ""], strict=True)]


def make_eval_step(stage: Stage, dtype: DTypeLike, layout: Layout | None = None) -> Callable:
    """evaluate(params, batch, key) -> (sums, counts) of the loss in the bins of LOG_SNR_EDGES.

    `batch` holds arguments of `training.stage_losses`: images, and text_embeds with text_masks.
    """
    return _eval_step(stage, dtype, layout or single())


@functools.lru_cache(maxsize=8)
def _eval_step(stage: Stage, dtype: DTypeLike, layout: Layout) -> Callable:
    placed = layout.place(nn.abstract(stage.network)[1])

    @functools.partial(
        jax.jit,
        in_shardings=(placed, layout.batch, layout.replicated),
        out_shardings=layout.replicated,
        compiler_options=compiler_options(layout.mesh.devices.flat[0]),
    )
    @layout.on_mesh
    def evaluate(params: Params, batch: dict[str, Array], key: PRNGKey) -> tuple[Array, Array]:
        network = nn.bind(stage.network, params, dtype=dtype)
        size = batch["images"].shape[0]
        draws = training.split_rows(training.complete_draws(stage, size, key, None))
        loss, log_snr = training.stage_losses(stage, network, draws=draws, **batch)
        return losses.binned(loss, log_snr, LOG_SNR_EDGES)

    return evaluate
