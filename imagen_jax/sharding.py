"""The placement of arrays: the mesh, and one rule for everything that is placed on it.

No other file of the project names mesh axes.

A mesh is DATA x MODEL. The batch is split over `data`. A parameter, its average and its moments are
split over both axes: over `data` to save memory (FSDP: gathered only while a layer runs), over
`model` because each device computes some of the channels or heads. With model = 2, along a block:

    x       channels split    at rest, and saved for the backward pass
    x       gathered          all-gather
    expand  (c, h/2)          "column": the kernel's outputs are split, and so the channels of h
    reduce  (h/2, c)          "row": its inputs are split, its outputs are partial sums
    y       channels split    reduce-scatter; added to x

Large feature maps have their rows split over `model` instead: convolutions exchange the rows at
the edges, and each device gathers the weights, which are small there (see `ROWS_FROM`).

Networks do not refer to the mesh. They name the axes of an activation, one word per axis, as in
`constrain(x, "b h w c")`, which is the identity without a mesh. `AXES` maps names to mesh axes:

    b        batch                                     split over `data`
    h, w     rows and columns of a feature map         h split over `model` in large maps
    p        all h * w pixels, flattened               split if h is; needs `h=`
    c        channels                                  split over `model`
    n        heads                                     split over `model`
    f, m, l  frames, tokens                            never split
    d, k     width of an embedding, and of a head      never split
    _        any axis, gathered                        never split
    ...      last word only: all other axes, gathered

`c` and `_` distinguish an activation at rest from one that every device needs complete:
`"b h w c"` has its channels split, `"b h w _"` has them gathered. A mesh axis splits at most one
axis of an array: the first that maps to it, divides evenly and, for h or p, belongs to a large map.
So large maps keep their rows split in both forms, and all other axes gathered.
"""

import contextlib
import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jaxtyping import Array, PyTree

from imagen_jax.errors import UserError

P = jax.P
DATA, MODEL = "data", "model"

MIN_SIZE = 2**18
"""Arrays with fewer elements are replicated: gathering them costs more than storing them."""

ROWS_FROM = 32
"""Feature maps with at least this many rows are split by rows over `model`, others by channels.

Measured: with 32, a step of each paper-sized stage communicates least and uses the least temporary
memory (`benchmarks/placement.py`, numbers in benchmarks/README.md).
"""

AXES = dict.fromkeys("fwmldk_") | {"b": DATA, "h": MODEL, "p": MODEL, "c": MODEL, "n": MODEL}
"""The axes of activations, and the mesh axis that may split each; see above."""

# Kernels whose outputs, or inputs, are split over `model`. Kernels that fuse keys and values are
# split by rows: split by columns, one half of the devices would hold the keys and the other the
# values. Kernels not named here are split along the larger of the two axes.
_COLUMN = {"block1", "res_conv", "to_q", "expand", "squeeze", "q", "k", "v", "wi", "wi_0", "wi_1"}
_COLUMN |= {"text_k", "text_v"}
_ROW = {"block2", "to_kv", "to_context", "to_out", "contract", "excite", "time_mlp", "o", "wo"}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh, and how arrays are placed on it."""

    mesh: Mesh
    min_size: int = MIN_SIZE

    def place(self, tree: PyTree) -> PyTree:
        """The sharding of every leaf, by its path and shape, for parameters or a tree of the same
        structure (averages, moments)."""
        return jax.tree_util.tree_map_with_path(
            lambda path, x: self.named(self.spec(_names(path), x.shape)), tree
        )

    def spec(self, names: Sequence[str], shape: tuple[int, ...]) -> jax.P:
        """The rule, for the leaf at the path `names`: ("downs", "block1", "project", "kernel")."""
        if len(shape) < 2 or math.prod(shape) < self.min_size:
            return P()
        owner = _owner(names)
        column = owner in _COLUMN or (owner not in _ROW and shape[-1] >= shape[-2])
        model, data = (-1, -2) if column else (-2, -1)
        axes: list[str | None] = [None] * len(shape)
        for name, wanted in ((MODEL, (model,)), (DATA, (data, model))):
            size = self.mesh.shape[name]
            free = [i for i in wanted if axes[i] is None and shape[i] % size == 0]
            if size > 1 and free:
                axes[free[0]] = name
        return P(*axes)

    def describe(self) -> str:
        """A summary, e.g. `8 x NVIDIA H100, mesh 8x1, 1 process`."""
        kind, processes = self.mesh.devices.flat[0].device_kind, jax.process_count()
        shape = "x".join(map(str, self.mesh.devices.shape))
        plural = "es" * (processes > 1)
        return f"{self.mesh.size} x {kind}, mesh {shape}, {processes} process{plural}"

    def largest(self, number: int) -> Array:
        """The largest of the numbers passed by the processes, all of which must call this."""
        every = self.named(P(self.mesh.axis_names))
        numbers = jax.make_array_from_callback(
            (self.mesh.size,), every, lambda index: np.full(1, number, np.int32)
        )
        return _compiled(jnp.max, self.replicated)(numbers)

    def put(self, path: Sequence[Any], x: np.ndarray) -> Array:
        """Places one leaf as `place` would. Each device gets its part of the process's copy."""
        names = [str(name) for name in path if not isinstance(name, int)]
        sharding = self.named(self.spec(names, x.shape))
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[index])

    def targets(self, tree: PyTree) -> PyTree:
        """The ShapeDtypeStructs of a tree with their shardings: the target of a restore."""
        return jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
            tree,
            self.place(tree),
        )

    @property
    def batch(self) -> NamedSharding:
        """Rows split over `data`, in order."""
        return self.named(P(DATA))

    def rows(self, count: int) -> NamedSharding:
        """`batch`, or `replicated` if `count` rows do not split evenly."""
        return self.replicated if count % self.mesh.shape[DATA] else self.batch

    def split_rows(self, count: int) -> int:
        """`count` rounded up to a number of rows that splits evenly over `data`."""
        return -(-count // self.mesh.shape[DATA]) * self.mesh.shape[DATA]

    @property
    def replicated(self) -> NamedSharding:
        return self.named(P())

    def named(self, spec: jax.P) -> NamedSharding:
        return NamedSharding(self.mesh, spec)

    def own_rows(self, batch_size: int) -> list[int]:
        """The rows of a batch that devices of this process hold, in order."""
        held = self.batch.addressable_devices_indices_map((batch_size,)).values()
        return sorted({row for (rows,) in held for row in range(batch_size)[rows]})

    def to_batch(self, own: PyTree, batch_size: int) -> PyTree:
        """Assembles global arrays from the `own_rows` of each process, as NumPy arrays."""
        place = {row: i for i, row in enumerate(self.own_rows(batch_size))}

        def assemble(x: np.ndarray) -> Array:
            def part(index: tuple[slice, ...]) -> np.ndarray:
                first, last, _ = index[0].indices(batch_size)
                return x[place[first] : place[last - 1] + 1]

            return jax.make_array_from_callback((batch_size, *x.shape[1:]), self.batch, part)

        return jax.tree.map(assemble, own)

    def replicate(self, tree: PyTree) -> PyTree:
        """Replicates arrays. Every process must pass equal ones."""
        return _compiled(_same, self.replicated)(tree)

    def on_mesh(self, fn: Callable) -> Callable:
        """Wraps `fn` so that it is traced for this mesh, and `constrain` takes effect in it."""

        @functools.wraps(fn)
        def traced(*args):
            with self.use():
                return fn(*args)

        return traced

    def fetch(self, tree: PyTree) -> PyTree:
        """Returns NumPy arrays, on every process."""
        return jax.device_get(self.replicate(tree))

    def key(self, seed: int) -> Array:
        """`jax.random.key(seed)` on every device."""
        return _compiled(jax.random.key, self.replicated)(np.uint32(seed))

    def use(self) -> contextlib.AbstractContextManager:
        """A context in which functions are traced and compiled for this mesh, so that `constrain`
        takes effect."""
        return jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh)


def single(device: jax.Device | None = None) -> Layout:
    """The layout of a single device."""
    return Layout(_mesh((1, 1), [device or jax.devices()[0]]))


def make_layout(
    text: str,
    *,
    rows: int | None = None,
    min_size: int = MIN_SIZE,
    devices: Sequence[jax.Device] | None = None,
) -> Layout:
    """A `DATAxMODEL` mesh over the devices of all processes, or over `devices`.

    One factor may be -1, for all remaining devices. `auto` puts all devices on the data axis: a
    model axis must be requested. A single process may use fewer devices than it has. Raises
    UserError if there are too few, or if `rows`, the images per step, do not split evenly over the
    data axis.
    """
    devices = jax.devices() if devices is None else devices
    count = len(devices)
    shape = mesh_shape(text, count=count)
    needed = math.prod(shape)
    if needed > count or (needed < count and jax.process_count() > 1):
        raise UserError(
            f"--mesh {text}: {shape[0]}x{shape[1]} needs {needed} devices, found {count}."
        )
    if rows is not None and rows % shape[0]:
        raise UserError(
            f"--mesh {text}: {rows} images a step do not split evenly over {shape[0]} devices. "
            f"{_nearest(rows, shape[0])} do (--batch-size divided by --accumulate)."
        )
    return Layout(_mesh(shape, devices[:needed]), min_size)


def _nearest(rows: int, devices: int) -> str:
    """The nearest multiples of `devices` below and above `rows`, for a message."""
    below = rows - rows % devices
    return f"{below} or {below + devices}" if below else f"{devices}"


def mesh_shape(text: str, *, count: int) -> tuple[int, int]:
    """The shape that `text` specifies for `count` devices; see `make_layout`."""
    if text == "auto":
        return count, 1
    data, model = parse(text)
    if -1 not in (data, model):
        return data, model
    known = max(data, model)
    if count % known:
        raise UserError(f"--mesh {text}: {count} devices cannot be divided into groups of {known}.")
    return (count // known, known) if data == -1 else (known, count // known)


def parse(text: str) -> tuple[int, int]:
    """`8x1` -> (8, 1); -1 stays. Raises UserError for anything else."""
    found = re.fullmatch(r"(-1|[1-9]\d*)x(-1|[1-9]\d*)", text)
    sizes = tuple(map(int, found.groups())) if found else (-1, -1)
    if sizes == (-1, -1):
        raise UserError(
            f"--mesh {text}: must be auto, or DATAxMODEL as in 8x1; one of the two may be -1."
        )
    return sizes


def constrain(x: Array, axes: str, *, h: int | None = None) -> Array:
    """Specifies how an activation is placed on the current mesh, by the names of its axes (above).

    `p`, flattened pixels, needs the rows `h` of the feature map: p alone does not distinguish
    64 x 16 from 16 x 64, and both forms of a map must be split the same way. Raises UserError if
    the names do not fit the array.
    """
    spec = _spec(axes, x.shape, h)
    return x if spec is None else jax.lax.with_sharding_constraint(x, spec)


def per_device(
    fn: Callable[..., Array], *arrays: Array, axes: Sequence[str], h: int | None = None
) -> Array:
    """Computes fn(*arrays), each device on its part, for kernels that the compiler cannot split.

    `axes` are those of each array, as in `constrain`; the result is split like the first. A name
    that splits no axis of the first array splits none of the others: where queries are split by
    rows, each device needs the keys of all heads.
    """
    first = _spec(axes[0], arrays[0].shape, h)
    if first is None:
        return fn(*arrays)
    intact = {name for name, axis in zip(axes[0].split(), first, strict=True) if axis is None}
    specs = tuple(
        _spec(" ".join("_" if name in intact else name for name in names.split()), x.shape, h)
        for names, x in zip(axes, arrays, strict=True)
    )
    return jax.shard_map(fn, in_specs=specs, out_specs=first, check_vma=False)(*arrays)


def _spec(axes: str, shape: tuple[int, ...], h: int | None) -> jax.P | None:
    """The mesh axis that splits each axis of an activation; None on a single device."""
    names = _axes(axes, shape, h)
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return None
    spec: list[str | None] = []
    for name, size in zip(names, shape, strict=True):
        rows = {"h": size, "p": h}.get(name)
        even = AXES[name] and (rows or size) % mesh.shape[AXES[name]] == 0
        large = rows is None or rows >= ROWS_FROM
        spec.append(AXES[name] if even and large and AXES[name] not in spec else None)
    return P(*spec)


def _axes(axes: str, shape: tuple[int, ...], h: int | None) -> list[str]:
    """The names in `axes`, one per axis of the array."""
    names = axes.split()
    if names[-1:] == ["..."]:
        names[-1:] = "_" * (len(shape) - len(names) + 1)
    if len(names) != len(shape):
        raise UserError(f"axes = {axes!r} do not fit an array of shape {shape}.")
    unknown = [name for name in names if name not in AXES]
    if unknown:
        raise UserError(f"axes = {axes!r}: {unknown[0]!r} is not one of {', '.join(AXES)}.")
    if "p" in names and (h is None or shape[names.index("p")] % h):
        raise UserError(
            f"axes = {axes!r}, shape {shape}: p needs h=, the rows of the feature map; got h={h}."
        )
    return names


def splits(size: int) -> bool:
    """Whether `model` has several devices and an axis of this size splits evenly over them."""
    return model_parallel() and size % jax.sharding.get_abstract_mesh().shape[MODEL] == 0


def model_parallel() -> bool:
    """Whether the current mesh has several devices along `model`, so that activations may be split
    over it."""
    return jax.sharding.get_abstract_mesh().shape.get(MODEL, 1) > 1


@contextlib.contextmanager
def traced_for(name: str) -> Iterator[None]:
    """A context in which `platform` returns `name`, e.g. to count the FLOPs of the plain forms."""
    token = _traced_for.set(name)
    try:
        yield
    finally:
        _traced_for.reset(token)


_traced_for: ContextVar[str | None] = ContextVar("traced_for", default=None)


def platform() -> str:
    """The platform that the function being traced will run on: `cpu`, `tpu`, or a GPU's name."""
    if (name := _traced_for.get()) is not None:
        return name
    device = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    return jax.default_backend() if device is None else device.platform


def _mesh(shape: tuple[int, int], devices: Sequence[jax.Device]) -> Mesh:
    # Not the default, Explicit, which rejects convolutions with split kernels.
    types = (AxisType.Auto,) * 2
    return jax.make_mesh(shape, (DATA, MODEL), axis_types=types, devices=devices)


@functools.cache
def _compiled(fn: Callable, sharding: NamedSharding) -> Callable:
    return jax.jit(fn, out_shardings=sharding)


def _same(x: PyTree) -> PyTree:
    return x


def _owner(names: Sequence[str]) -> str:
    """The module that owns the kernel; for the kernel of a convolution block, the block."""
    *_, block, module, _ = ("", "", *names)
    return block if module == "project" else module


def _names(path: tuple[Any, ...]) -> list[str]:
    """The names in a path, without the indices of lists."""
    names = jax.tree_util.keystr(path, simple=True, separator="/").split("/")
    return [name for name in names if not name.isdecimal()]
