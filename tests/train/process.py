"""One of several processes that train together, every array split, however small. What it reads
and draws is written down by row."""

from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

import commands
from commands import processes
from imagen_jax import training
from imagen_jax.sharding import Layout, make_layout
from train import loop, run
from train.settings import Settings


def train(settings: Settings, file: Path) -> None:
    """Runs the settings, and writes what it saw to `file`.npz."""

    def main():
        processes.start(settings.coordinator, settings.process_id, settings.num_processes)
        run.VISIBLE_WITHIN = 2.0  # seconds
        layout = make_layout(settings.mesh, rows=settings.rows, min_size=0)
        seen, loop.make_train_step = watched(layout, settings)
        commands.errors_go_to(settings.run)
        loop.run(settings, 1, layout)
        np.savez(file, **seen)

    commands.run(main)
    # At exit JAX waits for the others before its coordinator closes; forked processes have no exit
    # handlers.
    jax.distributed.shutdown()


def watched(layout: Layout, settings: Settings) -> tuple[dict[str, np.ndarray], Callable]:
    """What this process has of the draws of two steps; and a `make_train_step` that adds what it
    has of every step's pictures. `rows` are their numbers."""
    stage, make_train_step = settings.cascade().stage(1), loop.make_train_step
    seen = {"rows": np.array(layout.own_rows(settings.batch_size))}
    draw = jax.jit(
        layout.on_mesh(lambda key: training.complete_draws(stage, settings.batch_size, key, None)),
        out_shardings=layout.batch,
    )
    for number in range(2):
        for name, array in vars(draw(jax.random.fold_in(layout.key(0), number))).items():
            if array is not None:
                seen[f"{name}{number}"] = own_part(array)

    def make(*args):
        compiled = make_train_step(*args)

        def train_step(state, batch, key):
            seen[f"images{int(state.step)}"] = own_part(batch["images"])
            seen[f"text{int(state.step)}"] = own_part(batch["text_masks"])
            return compiled(state, batch, key)

        return train_step

    return seen, make


def own_part(array: jax.Array) -> np.ndarray:
    parts = {
        shard.index[0].start or 0: np.asarray(shard.data) for shard in array.addressable_shards
    }
    return np.concatenate([parts[first] for first in sorted(parts)])
