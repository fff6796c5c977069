"""The smallest cascade that trains, as the JSON file a user would write, and its settings."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from imagen_jax import checkpoint
from imagen_jax.config import ImagenConfig, UnetConfig
from imagen_jax.nn import abstract
from imagen_jax.sharding import single
from tests import SMALLEST_UNET
from train.log import read
from train.optimizer import make_optimizer
from train.settings import Settings
from train.state import TrainState

UNET = UnetConfig(**SMALLEST_UNET, cond_dim=8, max_text_len=16)
CASCADE = ImagenConfig(
    unets=(UNET, UNET),
    image_sizes=(8, 12),
    text_encoder_name="demo",
    pred_objectives="v",
    noise_schedules="cosine",
)


def settings(folder: Path, **changes) -> Settings:
    """Four pictures a step, evaluated at both ends, nothing sampled."""
    file = folder / "cascade.json"
    file.write_text(json.dumps(CASCADE.to_dict()))
    plain = Settings(
        config=file,
        mesh="1x1",
        workdir=folder / "run",
        steps=4,
        batch_size=4,
        limit=8,
        log_every=1,
        eval_every=100,
        eval_batches=1,
        save_every=2,
        sample_every=0,
        ema="plain",
        keep=None,
    )
    return dataclasses.replace(plain, **changes)


def saved(run: Path, step: int, item: str = "params", unet_number: int = 1):
    """The `params`, `ema` or `opt_state` of a saved step."""
    state = jax.eval_shape(
        lambda params: TrainState.create(params, make_optimizer(Settings())),
        abstract(UNET_OF[unet_number])[1],
    )
    return checkpoint.restore(run, unet_number, step, item, single().targets(getattr(state, item)))


def other_cascade(folder: Path) -> Path:
    """The file of a cascade with wider networks."""
    data = CASCADE.to_dict()
    for unet in data["unets"]:
        unet["dim"] = 16
    (folder / "other.json").write_text(json.dumps(data))
    return folder / "other.json"


UNET_OF = {number: CASCADE.unets[number - 1] for number in (1, 2)}


def metrics(run: Path, kind: str = "train") -> list[dict]:
    return [line for line in read(run) if line["kind"] == kind]


def assert_equal(a, b) -> None:
    jax.tree.map(np.testing.assert_array_equal, a, b)


def finite(tree) -> bool:
    return all(np.isfinite(x).all() for x in jax.tree.leaves(tree))
