"""The newest weights of a run directory as NumPy arrays with the stored dtypes."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from imagen_jax import checkpoint, run_config, storage
from imagen_jax.checkpoint import ITEMS, Weights
from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.errors import UserError
from imagen_jax.interop import keys
from imagen_jax.types import Params


@dataclasses.dataclass(frozen=True)
class RunDir:
    """The newest weights of a run directory. `origin`: see `interop.imagen_pytorch.Checkpoint`."""

    path: epath.Path
    config: ImagenConfig
    steps: Mapping[int, int]  # by number, for each U-Net that has weights
    origin: Mapping[str, Any] | None
    notes: tuple[str, ...] = ()  # of `checkpoint.Choice`

    @classmethod
    def open(cls, path: str | os.PathLike) -> "RunDir":
        """Raises UserError if `path` is not a run directory."""
        config, steps, notes = run_config.read(path), {}, ()
        for number in range(1, len(config.unets) + 1):
            choice = checkpoint.choose(path, number)
            if choice is not None:
                steps[number] = choice.step
                notes += choice.notes
        return cls(storage.folder(path), config, steps, run_config.read_origin(path), notes)

    def has(self, number: int, weights: Weights) -> bool:
        stage = checkpoint.stage_path(self.path, number)
        return (stage / str(self.steps.get(number)) / ITEMS[weights]).is_dir()

    def params(self, number: int, weights: Weights) -> Params:
        """The arrays as they are stored. Raises UserError if there are none, and MisfitError if
        their architecture is not that of the configuration."""
        if not self.has(number, weights):
            raise UserError(f"{self.path} holds no {weights} weights of U-Net {number}.")
        target = keys.target(self.config.unets[number - 1])
        place = (self.path, number, self.steps[number], ITEMS[weights])
        stored = keys.flatten(checkpoint.stored_shapes(*place))
        expected = {name: leaf.shape for name, leaf in keys.flatten(target).items()}
        shapes = {name: leaf.shape for name, leaf in stored.items()}
        keys.check(shapes, expected, f"unets.{number - 1}.")
        return checkpoint.restore(*place, target, as_numpy=True)

    def params_or_null(self, number: int, weights: Weights) -> Params:
        """`params`; for a `NullUnet` that was never stored, its initial zero."""
        is_null = isinstance(self.config.unets[number - 1], NullUnetConfig)
        if is_null and number not in self.steps:
            return {"dummy_parameter": np.zeros(1, np.float32)}
        return self.params(number, weights)
