"""Where weights are while nothing is computed with them: on the device, or in the host's memory.

A cascade and its T5 together may need more memory than a device has, but no two of the networks are
ever used at once. `streamed` weights wait in the host's memory (pinned, so that copies run at the
bus's speed) and are copied to the device for as long as their network runs.
"""

from typing import Literal

import jax
from jaxtyping import PyTree

from imagen_jax.sharding import Layout

Memory = Literal["auto", "resident", "streamed"]

HOST = "pinned_host"
SHARE = 0.5
"""Of a device's memory: weights that need more are streamed by `auto`. The rest is for activations,
and for what the allocator cannot give."""


def streams(memory: Memory, nbytes: int, layout: Layout | None = None) -> bool:
    """Whether weights of `nbytes`, split over the layout's devices, are streamed.

    `auto` decides by the device's memory, and keeps them resident where that is not known (a CPU).
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
    """The arrays in the memory of the hosts of their devices, distributed as they are."""
    return jax.device_put(
        tree, jax.tree.map(lambda leaf: leaf.sharding.with_memory_kind(HOST), tree)
    )


def to_device(tree: PyTree) -> PyTree:
    """Copies on the devices, of arrays that wait on the host; the tree itself if none does."""
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
