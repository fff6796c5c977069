"""Where weights are while they are not in use: on the device, or in the host's memory.

A cascade and its T5 together may need more memory than a device has, but no two of the networks are
ever used at once. `streamed` weights wait in the host's memory (pinned, so that copies run at full
bus speed) and are on the device only while their network runs.
"""

from typing import Literal

import jax
from jaxtyping import PyTree

from imagen_jax.sharding import Layout

Memory = Literal["auto", "resident", "streamed"]

HOST = "pinned_host"
SHARE = 0.5
"""Share of a device's memory: `auto` streams weights that need more. The rest is for activations,
and for memory that the allocator cannot provide."""


def streams(memory: Memory, nbytes: int, layout: Layout | None = None) -> bool:
    """Whether weights of `nbytes`, split over the layout's devices, are streamed.

    `auto` decides by the device's memory, and keeps them resident if that is not known (on a CPU).
    """
    if memory != "auto":
        return memory == "streamed"
    devices = jax.devices()[:1] if layout is None else layout.mesh.local_devices
    limit = (devices[0].memory_stats() or {}).get("bytes_limit")
    count = 1 if layout is None else layout.mesh.size
    return limit is not None and nbytes > SHARE * limit * count


def nbytes(tree: PyTree) -> int:
    """Bytes of a tree's arrays, or of their shapes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def to_host(tree: PyTree) -> PyTree:
    """The arrays in the memory of their devices' hosts, with the same sharding."""
    return jax.device_put(
        tree, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(HOST), tree)
    )


def to_device(tree: PyTree) -> PyTree:
    """Copies the arrays that wait on the host to the devices; returns the tree if none does."""
    if not any(map(_waits, jax.tree.leaves(tree))):
        return tree
    return jax.device_put(
        tree, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind("device"), tree)
    )


def _waits(leaf: object) -> bool:
    return (
        isinstance(leaf, jax.Array)
        and not isinstance(leaf, jax.core.Tracer)
        and leaf.sharding.memory_kind == HOST
    )
