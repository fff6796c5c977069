"""The state a run begins with: its own, saved; or another run's weights; or fresh ones."""

import dataclasses
import functools
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imagen_jax import checkpoint, distributed, nn
from imagen_jax.config import ImagenConfig, UnetConfig
from imagen_jax.fields import first_difference
from imagen_jax.sharding import Layout
from imagen_jax.streams import stream
from imagen_jax.types import Params
from train.optimizer import make_optimizer
from train.settings import Settings, flag
from train.state import TrainState

TREES = ("params", "ema", "opt_state")

# What decides which pictures and which noise a step meets, and what the optimiser remembers.
SAME = (
    *("seed", "batch_size", "data", "captions_from", "limit", "heldout_fraction", "flip"),
    *("optimizer", "moments"),
)
# The same of the data itself, as a run records it: how many pictures, and which in which order.
MEASURED = {"pictures": "the number of pictures", "order": "what the data holds (its hash)"}

VISIBLE_WITHIN = 60.0  # seconds in which a shared folder shows what another machine wrote


@dataclasses.dataclass(frozen=True)
class Begun:
    """Where a run begins: the state, and the measurements since the last line of metrics."""

    state: TrainState
    measured: list[dict[str, float]]


def newest_steps(run: Path, unet_number: int) -> tuple[int | None, int | None]:
    """The newest step of a run, and the newest whole one; the same for all processes.

    Raises ValueError if they do not all see the same.
    """
    found = checkpoint.steps(run, unet_number), checkpoint.latest_step(run, unet_number)
    every = [json.loads(text) for text in distributed.gather(json.dumps(found))]
    if any(other != every[0] for other in every):
        whole = ", ".join(str(newest) for _, newest in every)
        raise ValueError(
            f"the processes see different steps in {run}/unet{unet_number} (the newest: {whole}): "
            "--workdir must be a folder that all of them share. If it is, start them again."
        )
    return max(found[0], default=None), found[1]


def check_shared(run: Path) -> None:
    """Raises ValueError unless every process sees the `config.json` that one has written."""
    distributed.gather("written")
    given_up = time.monotonic() + VISIBLE_WITHIN
    while not (run / "config.json").exists() and time.monotonic() < given_up:
        time.sleep(1)
    seen = distributed.gather("yes" if (run / "config.json").exists() else "no")
    if "no" in seen:
        raise ValueError(
            f"process {seen.index('no')} of {len(seen)} does not see {run} as process 0 writes it: "
            "--workdir must be a folder that all of them share."
        )


def resume(
    config: ImagenConfig,
    unet_number: int,
    settings: Settings,
    layout: Layout,
    record: Mapping[str, Any],
) -> Begun:
    """The newest state that can be read, saved on whatever mesh, placed on this one.

    Damaged ones are named, and renamed once an older one is read. ValueError unless `record`
    continues what was recorded there, and if no step can be read.
    """
    run, damaged = settings.run, []
    for step in checkpoint.steps(run, unet_number):
        error, begun = None, None
        try:
            begun = _saved(config, unet_number, settings, layout, step, record)
        except checkpoint.Damaged as damage:
            error = str(damage)
        errors = [text for text in distributed.gather(error or "") if text]
        if errors:
            damaged.append((step, errors[0]))
            continue
        for broken, error in damaged:
            print(f"{error}. Going on from step {step}.")
            if distributed.talks():
                checkpoint.set_aside(run, unet_number, broken)
        distributed.gather("renamed")
        return begun
    raise ValueError(f"{damaged[0][1]}. No older step of {run}/unet{unet_number} can be read.")


def _saved(
    config: ImagenConfig,
    unet_number: int,
    settings: Settings,
    layout: Layout,
    step: int,
    record: Mapping[str, Any],
) -> Begun:
    meta = checkpoint.read_meta(settings.run, unet_number, step)
    there = meta.get("settings")
    if there is None:
        raise ValueError(
            f"{settings.run}/unet{unet_number} holds weights alone: start another run from them "
            "with --init-from."
        )
    for name in (*SAME, *MEASURED):
        was, now = there.get(name, record[name]), record[name]  # older runs recorded less
        if was != now:
            raise ValueError(
                f"{MEASURED.get(name) or flag(name)} was {was} and is {now}: that would not "
                "continue the run. Start another with --init-from."
            )
    shapes = TrainState.shapes(config.stage(unet_number).network, make_optimizer(settings))
    target = layout.targets(shapes)
    trees = {
        name: checkpoint.restore(settings.run, unet_number, step, name, getattr(target, name))
        for name in TREES
    }
    state = TrainState(step=layout.replicate(np.int32(step)), **trees)
    return Begun(state, meta.get("measured", []))


def begin(config: ImagenConfig, unet_number: int, settings: Settings, layout: Layout) -> Begun:
    """The state before the first step: weights of `--init-from`, or drawn from the seed."""
    unet, optimizer = config.stage(unet_number).network, make_optimizer(settings)
    if settings.init_from is not None:
        params = _weights_of(settings.init_from, unet_number, unet, layout)
    else:
        key = stream(layout.key(settings.seed), "init", unet_number)
        params = nn.init_fn(unet, layout)(key)
    create = functools.partial(TrainState.create, optimizer=optimizer)
    placed = layout.place(TrainState.shapes(unet, optimizer))
    return Begun(jax.jit(create, out_shardings=placed, donate_argnums=0)(params), [])


def _weights_of(run: Path, unet_number: int, unet: UnetConfig, layout: Layout) -> Params:
    source = checkpoint.read_config(run).stage(unet_number).network
    difference = first_difference(source, unet, f"unets.{unet_number - 1}")
    if difference:
        raise ValueError(f"--init-from {run}: {difference}.")
    params = checkpoint.load_params(run, unet_number, layout=layout)
    if params is None:
        raise ValueError(f"{run} has no weights of U-Net {unet_number}.")
    return params
