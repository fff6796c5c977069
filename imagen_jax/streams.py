"""Named streams of randomness: no two purposes share a key.

    run key -> stream(key, name) -> numbers (U-Net, step, row, ...) by fold_in

`jax.random.fold_in(k, i)` equals `jax.random.split(k, n)[i]`, so keys that are derived by small
numbers alone collide as soon as two places count from zero. A stream's name is hashed to 32 bits
first; the numbers that follow it count within the stream.
"""

import zlib

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, Key

from imagen_jax.errors import UserError
from imagen_jax.types import PRNGKey

RowKeys = Key[Array, "b"]

RUN = ("init", "train", "evaluation", "preview")
"""Streams of a training run, each followed by the U-Net's number, then by the step or the batch."""


def stream(key: PRNGKey | RowKeys, name: str, *numbers: int | Int[Array, ""]) -> PRNGKey | RowKeys:
    """The key of a named stream, or of a place in it; one per row if `key` has one per row."""
    if key.ndim:
        return jax.vmap(lambda one: stream(one, name, *numbers))(key)
    key = jax.random.fold_in(key, zlib.crc32(name.encode()))
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


class ParamKeys(nnx.Rngs):
    """The keys of `nnx.Rngs(params=key)`, counted in Python.

    The count of `nnx.Rngs` is an array. In a traced function every draw asks it for its sharding,
    and a tracer raises an error whose message needs a walk over the trace so far: this took 13 of
    the 15 seconds of tracing a paper-sized network.
    """

    def __init__(self, key: PRNGKey):
        self.key, self.drawn = key, 0

    def params(self) -> PRNGKey:
        self.drawn += 1
        return jax.random.fold_in(self.key, self.drawn - 1)


def row_keys(key: PRNGKey | RowKeys, count: int) -> RowKeys:
    """A key for each of `count` rows: those given, or derived from one key and the row's index."""
    if not (isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)):
        raise UserError(f"key must be made by jax.random.key(seed), not {key!r:.40}.")
    if not key.ndim:
        return jax.vmap(lambda place: stream(key, "row", place))(jnp.arange(count))
    if len(key) != count:
        raise UserError(f"{len(key)} keys for a batch of {count}: give one key, or one per row.")
    return key


def image_seeds(seed: int, count: int) -> list[int]:
    """A seed for each of `count` images: the first is `seed` itself, so that any of them, given
    alone, reproduces its image; the others are derived from it and their index, in [0, 2**32)."""
    derived = (int(np.random.SeedSequence([seed, i]).generate_state(1)[0]) for i in range(1, count))
    return [seed, *derived][:count]


def seed_keys(seeds: list[int]) -> RowKeys:
    """One key for each seed."""
    return jax.vmap(jax.random.key)(jnp.asarray(seeds, jnp.uint32))


def normal(keys: RowKeys, shape: tuple[int, ...]) -> Array:
    """Standard normal rows of a shape, each a function of its own key only."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def spherical(a: Array, b: Array, fraction: Float[Array, "b"]) -> Array:
    """Interpolates from rows a (at 0) to b (at 1) along the great circle (Shoemake 1985): the norm
    is kept, so that anything between two noises is as noisy as they are. Equal rows are kept."""
    axes = tuple(range(1, a.ndim))
    norm = jnp.sqrt(jnp.sum(a * a, axes) * jnp.sum(b * b, axes))
    angle = jnp.arccos(jnp.clip(jnp.sum(a * b, axes) / norm, -1.0, 1.0))
    straight = angle < 1e-3
    sine = jnp.where(straight, 1.0, jnp.sin(angle))
    weights = (
        jnp.where(straight, part, jnp.sin(part * angle) / sine)
        for part in (1.0 - fraction, fraction)
    )
    return sum(jnp.expand_dims(weight, axes) * x for weight, x in zip(weights, (a, b), strict=True))
