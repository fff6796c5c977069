"""A network applied to overlapping tiles of a sample larger than it was trained on.

    output = sum over tiles of window x network(tile)

Outputs are blended at every step, so that samplers, guidance and thresholds see one large sample.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array

from imagen_jax import tiling


class Tiled(NamedTuple):
    """Called like the network. `batch` tiles are computed at once."""

    network: Any
    tiles: tiling.Tiles
    batch: int

    def __call__(
        self,
        x: Array,
        time: Array,
        *,
        text_cond: Any = None,
        lowres_noise_times: Array | None = None,
        key: Any = None,
        **images: Array | None,
    ) -> Array:
        """`images` are cut like x: lowres_cond_img, cond_images and self_cond."""
        b, k = x.shape[0], self.batch
        repeat = lambda tree: jax.tree.map(lambda a: jnp.concatenate([a] * k), tree)  # noqa: E731
        shared = repeat((time, text_cond, lowres_noise_times))
        images = {name: image for name, image in images.items() if image is not None}

        def answer(origins: Array) -> Array:
            cut = jax.vmap(lambda origin, a: self._cut(a, origin), (0, None))
            parts = {
                name: cut(origins, image).reshape(k * b, *self.tiles.tile, image.shape[-1])
                for name, image in ({"x": x} | images).items()
            }
            time, text, lowres_time = shared
            out = self.network(
                parts.pop("x"),
                time,
                text_cond=text,
                lowres_noise_times=lowres_time,
                key=key,
                **parts,
            ).astype(jnp.float32)
            return out.reshape(k, b, *out.shape[1:])

        def add(total: Array, chunk: tuple[Array, Array]) -> tuple[Array, None]:
            origins, windows = chunk
            out = answer(origins) * windows[:, None, :, :, None]
            for place in range(k):
                at = (0, origins[place, 0], origins[place, 1], 0)
                here = lax.dynamic_slice(total, at, out.shape[1:])
                total = lax.dynamic_update_slice(total, here + out[place], at)
            return total, None

        origins, rows, columns = self._chunks()
        channels = jax.eval_shape(answer, origins[0]).shape[-1]
        total = jnp.zeros((*x.shape[:-1], channels))
        windows = rows[..., :, None] * columns[..., None, :]
        return lax.scan(add, total, (origins, windows))[0]

    def _cut(self, image: Array, origin: Array) -> Array:
        sizes = (image.shape[0], *self.tiles.tile, image.shape[-1])
        return lax.dynamic_slice(image, (0, origin[0], origin[1], 0), sizes)

    def _chunks(self) -> tuple[Array, Array, Array]:
        """Origins and windows, `batch` tiles per chunk; the last is padded with windows of 0."""
        tiles, missing = self.tiles, -len(self.tiles.origins) % self.batch
        rows = tiling.windows(tiles.tops, tiles.tile[0], tiles.image[0])
        columns = tiling.windows(tiles.lefts, tiles.tile[1], tiles.image[1])
        rows = np.repeat(rows, len(tiles.lefts), axis=0)
        columns = np.tile(columns, (len(tiles.tops), 1))
        parts = (tiles.origins, rows.astype(np.float32), columns.astype(np.float32))
        return tuple(
            jnp.asarray(np.pad(part, ((0, missing), (0, 0))).reshape(-1, self.batch, part.shape[1]))
            for part in parts
        )
