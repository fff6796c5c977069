"""The state a run begins with: its own, saved; or another run's weights; or fresh ones."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imagen_jax import checkpoint, nn
from imagen_jax.config import ImagenConfig, UnetConfig
from imagen_jax.sharding import Layout
from imagen_jax.types import Params
from train.optimizer import make_optimizer
from train.settings import Settings, flag
from train.state import TrainState

TREES = ("params", "ema", "opt_state")

# What decides which pictures and which noise a step meets, and what the optimiser remembers.
SAME = ("seed", "batch_size", "data", "limit", "heldout_fraction", "flip", "optimizer", "moments")


def resume(
    config: ImagenConfig,
    unet_number: int,
    settings: Settings,
    layout: Layout,
    step: int,
    record: Mapping[str, Any],
) -> TrainState:
    """The state saved at `step`, on whatever mesh, placed on this one.

    ValueError unless `record` continues what was recorded there.
    """
    there = checkpoint.read_meta(settings.run, unet_number, step).get("settings")
    if there is None:
        raise ValueError(
            f"{settings.run}/unet{unet_number} holds weights alone: start another run from them "
            "with --init-from."
        )
    for name in (*SAME, "pictures"):
        was, now = there.get(name, record[name]), record[name]  # older runs recorded less
        if was != now:
            what = "the number of pictures" if name == "pictures" else flag(name)
            raise ValueError(
                f"{what} was {was} and is {now}: that would not continue the run. "
                "Start another with --init-from."
            )
    shapes = TrainState.shapes(config.stage(unet_number).unet, make_optimizer(settings))
    target = layout.targets(shapes)
    trees = {
        name: checkpoint.restore(settings.run, unet_number, step, name, getattr(target, name))
        for name in TREES
    }
    return TrainState(step=layout.replicate(np.int32(step)), **trees)


def begin(config: ImagenConfig, unet_number: int, settings: Settings, layout: Layout) -> TrainState:
    """The state before the first step: weights of `--init-from`, or drawn from the seed."""
    unet, optimizer = config.stage(unet_number).unet, make_optimizer(settings)
    if settings.init_from is not None:
        params = _weights_of(settings.init_from, unet_number, unet, layout)
    else:
        key = jax.random.fold_in(layout.key(settings.seed), unet_number)
        params = nn.init_fn(unet, layout)(key)
    create = functools.partial(TrainState.create, optimizer=optimizer)
    placed = layout.place(TrainState.shapes(unet, optimizer))
    return jax.jit(create, out_shardings=placed, donate_argnums=0)(params)


def _weights_of(run: Path, unet_number: int, unet: UnetConfig, layout: Layout) -> Params:
    source = checkpoint.read_config(run).stage(unet_number).unet
    difference = checkpoint.first_difference(source, unet, f"unets.{unet_number - 1}")
    if difference:
        raise ValueError(f"--init-from {run}: {difference}.")
    params = checkpoint.load_params(run, unet_number, layout=layout)
    if params is None:
        raise ValueError(f"{run} has no weights of U-Net {unet_number}.")
    return params
