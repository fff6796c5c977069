"""A cascade ready to sample: weights in their sampling dtype on a mesh, and the encoder.

    pipeline = Pipeline.load("runs/demo", mesh="auto")
    embeds = pipeline.encode(["red apple", "pear"])
    for index, image in pipeline.generate(embeds, seeds=[7, 8], cond_scale=(3.0, 1.0)): ...

Commands are thin over it. What is expensive is read at its first use.
"""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Bool, Float

from imagen_jax import checkpoint, nn, text
from imagen_jax.checkpoint import Choice, Weights
from imagen_jax.config import ImagenConfig
from imagen_jax.imagen import Imagen
from imagen_jax.sharding import Layout, make_layout
from imagen_jax.streams import seed_keys


class Embeddings(NamedTuple):
    """Encoded prompts, on the host."""

    embeds: Float[np.ndarray, "n l d"]
    masks: Bool[np.ndarray, "n l"]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Pipeline:
    """A loaded cascade. `load` makes one."""

    run: str | os.PathLike
    config: ImagenConfig
    choices: Mapping[int, Choice]
    """What is read of each U-Net that has weights, by its number: step, average or online, and what
    was passed over. A command says these notes."""
    dtype: np.dtype
    layout: Layout | None
    text_encoder_name: str

    @classmethod
    def load(
        cls,
        run: str | os.PathLike,
        *,
        mesh: str | Layout | None = None,
        dtype: DTypeLike | None = None,
        weights: Weights = "ema",
        t5: str | None = None,
        unet_numbers: Sequence[int] | None = None,
    ) -> "Pipeline":
        """The cascade of a run directory.

        `mesh`, as "8x1" or "auto", distributes weights and images over devices; None is the first
        one. `dtype` is what weights are kept and computed in (default: `nn.compute_dtype`). `t5` is
        the folder or name of the cascade's encoder, where that is not its `text_encoder_name`.
        `unet_numbers` are the U-Nets to load. What is read of each is decided here (`choices`),
        before anything is loaded. Raises UserError if `run` is not a run directory, or for a mesh
        that the devices do not have.
        """
        config = checkpoint.read_config(run)
        return cls(
            run=run,
            config=config,
            choices=checkpoint.choose_all(run, config, weights, unet_numbers),
            dtype=nn.compute_dtype(dtype),
            layout=make_layout(mesh) if isinstance(mesh, str) else mesh,
            text_encoder_name=t5 or config.text_encoder_name,
        )

    @functools.cached_property
    def imagen(self) -> Imagen:
        """The cascade with its weights, cast once to `dtype`. Raises UserError, which names the
        array, for weights that are not finite."""
        return checkpoint.load(
            self.run,
            dtype=self.dtype,
            param_dtype=self.dtype,
            mesh=self.layout,
            choices=self.choices,
        )

    @functools.cached_property
    def encoder(self) -> text.TextEncoder:
        """The text encoder in `dtype`. Raises UserError if it is not the cascade's."""
        return text.cascade_encoder(
            self.config,
            name=self.text_encoder_name,
            dtype=self.dtype,
            layout=self.layout,
            recorded=checkpoint.read_text_encoder(self.run),
        )

    def release_encoder(self) -> None:
        """Gives the encoder's memory back; the next use reads it again."""
        self.__dict__.pop("encoder", None)

    def encode(self, prompts: Sequence[str], *, batch_size: int = 8) -> Embeddings:
        """Embeddings of prompts, `batch_size` at a time, as `Imagen.encode_text` gives them."""
        parts = [
            self.encoder([prompts[row] for row in rows], length=self.config.text_len)
            for rows in batches(len(prompts), batch_size)
        ]
        found = (np.concatenate(part)[: len(prompts)] for part in zip(*parts, strict=True))
        return Embeddings(*found)

    def generate(
        self,
        embeddings: Embeddings | None,
        *,
        seeds: Sequence[int],
        batch_size: int = 8,
        progress: Callable[[np.ndarray, int], Any] | None = None,
        **arguments: Any,
    ) -> Iterator[tuple[int, Float[np.ndarray, "h w c"]]]:
        """Index and pixels, in [0, 1], of image after image; one a seed.

        An image is a function of its embedding, its seed and the arguments of `Imagen.sample`, not
        of its batch or of the mesh, to rounding. `embeddings` has one row a seed.
        `progress(indices, count)` is a context that gives the batch's `Progress`.
        """
        size = min(len(seeds), batch_size)
        if self.layout is not None:
            size = self.layout.split_rows(size)
        for rows in batches(len(seeds), size, fill=True):
            given = dict(arguments, batch_size=len(rows))
            if embeddings is not None:
                given["text_embeds"], given["text_masks"] = (part[rows] for part in embeddings)
            fresh = np.unique(rows)
            with (
                contextlib.nullcontext()
                if progress is None
                else progress(fresh, len(seeds)) as listener
            ):
                images = self.imagen.sample(
                    key=seed_keys([seeds[row] for row in rows]), progress=listener, **given
                )
            images = np.asarray(images)
            yield from zip(fresh.tolist(), images, strict=False)


def batches(count: int, batch_size: int, *, fill: bool = False) -> Iterator[np.ndarray]:
    """Indices of batch after batch, all of one shape: the last repeats index `count` - 1.

    With `fill` a batch is not smaller than `batch_size` even where `count` is.
    """
    size = batch_size if fill else min(count, batch_size)
    for first in range(0, count, size):
        yield np.minimum(np.arange(first, first + size), count - 1)
