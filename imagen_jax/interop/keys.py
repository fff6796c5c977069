"""Applies the table: from a state dict of imagen-pytorch's `Unet` to our parameters, and back.

Both directions are strict: every name on either side has a counterpart of the right shape, or
nothing is converted and all that does not fit is listed. Arrays keep their dtype, and are views of
the input, so that converting costs no memory until they are written or placed.
"""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from imagen_jax import nn
from imagen_jax.config import AnyUnet, NullUnetConfig
from imagen_jax.errors import UserError
from imagen_jax.interop.table import UNET, Change, Table
from imagen_jax.types import Params

SHOWN = 40  # rows of a table of problems
ROW = "{:<8} {:<60} {:<20} {}"


@dataclasses.dataclass(frozen=True)
class Problem:
    """A tensor without a counterpart, in the reference's names and shapes."""

    kind: str  # "unknown", "missing" or "shape"
    name: str
    shape: tuple[int, ...]
    nearest: str  # the name, or the shape, that would fit

    def __str__(self) -> str:
        return ROW.format(self.kind, self.name, str(self.shape), self.nearest)


class MisfitError(UserError):
    """All tensors that do not fit: a table with the nearest candidates."""

    def __init__(self, problems: list[Problem], count: int):
        self.problems = problems
        head = ROW.format("", "tensor", "shape", "closest name, or expected shape")
        rows = [head, *map(str, problems[:SHOWN])]
        if len(problems) > SHOWN:
            rows.append(f"... and {len(problems) - SHOWN} more")
        table = "\n  ".join(rows)
        super().__init__(f"{len(problems)} of {count} tensors do not fit.\n  {table}")


def to_jax(
    state_dict: Mapping[str, Any], target: Params, *, prefix: str = "", table: Table = UNET
) -> Params:
    """The parameters of a U-Net from the state dict of the reference's, as NumPy arrays.

    `target` describes the result: the pure dict of arrays or `jax.ShapeDtypeStruct`s that
    `nn.abstract(config)` gives; only its shapes matter. `prefix` goes before names in messages.
    Raises MisfitError (a ValueError).
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(target)
    wanted = {_join(path): leaf.shape for path, leaf in leaves}
    counterparts = _counterparts(tuple(wanted), table)
    expected = {
        theirs: change.to_torch(np.broadcast_to(0, wanted[ours])).shape
        for ours, (theirs, change) in counterparts.items()
    }
    check({name: np.shape(array) for name, array in state_dict.items()}, expected, prefix)
    return structure.unflatten(
        change.to_jax(np.asarray(state_dict[theirs]))
        for theirs, change in (counterparts[ours] for ours in wanted)
    )


def to_torch(params: Params, *, table: Table = UNET) -> dict[str, np.ndarray]:
    """The state dict of the reference's U-Net with these parameters, as NumPy arrays.

    Raises ValueError that lists every parameter that is not in the table.
    """
    leaves = flatten(params)
    return {
        theirs: change.to_torch(np.asarray(leaves[ours]))
        for ours, (theirs, change) in _counterparts(tuple(leaves), table).items()
    }


def check(
    shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]], prefix: str = ""
) -> None:
    """Raises MisfitError with everything that differs."""
    unknown, missing = shapes.keys() - expected.keys(), expected.keys() - shapes.keys()

    def nearest(name: str, names: Iterable[str]) -> str:
        return next(iter(difflib.get_close_matches(name, names, n=1)), "none")

    problems = [
        *(Problem("unknown", n, shapes[n], nearest(n, missing)) for n in sorted(unknown)),
        *(Problem("missing", n, expected[n], nearest(n, unknown)) for n in sorted(missing)),
        *(
            Problem("shape", n, shapes[n], str(expected[n]))
            for n in shapes
            if n in expected and shapes[n] != expected[n]
        ),
    ]
    if problems:
        named = [dataclasses.replace(row, name=prefix + row.name) for row in problems]
        raise MisfitError(named, len(shapes.keys() | expected.keys()))


def target(unet: AnyUnet) -> Params:
    """The shapes of a U-Net's parameters in this project."""
    if isinstance(unet, NullUnetConfig):
        return {"dummy_parameter": jax.ShapeDtypeStruct((1,), np.float32)}
    return nn.abstract(unet)[1]


def flatten(params: Params) -> dict[str, Any]:
    """The leaves of a tree of parameters by their dotted names: `downs.0.init_block.block1...`."""
    return {_join(path): leaf for path, leaf in jax.tree_util.tree_flatten_with_path(params)[0]}


def _entries(table: Table, prefix: tuple[str, str] = ("", "")) -> Iterator[tuple]:
    for theirs, ours, entry in table:
        names = prefix[0] + theirs, prefix[1] + ours
        if isinstance(entry, Change):
            yield *names, entry
        else:
            yield from _entries(entry, (names[0] + ".", names[1] + "."))


@functools.lru_cache(maxsize=16)
def _counterparts(names: tuple[str, ...], table: Table) -> dict[str, tuple[str, Change]]:
    """Our name -> the reference's, and how the array changes; for all of a U-Net's names.

    Raises ValueError for names that are not in the table.
    """
    found, unknown = {}, []
    for name in names:
        block, layered, rest = name.partition(".layers.")
        is_linear = layered and f"{block}.layers.0.attn.to_k.0.kernel" in names
        marked = f"{block}.linear_layers.{rest}" if is_linear else name
        for pattern, theirs, change in _rules(table).get(re.sub(r"\d+", "#", marked), ()):
            if match := pattern.fullmatch(marked):
                for number in match.groups():
                    theirs = theirs.replace("#", number, 1)
                found[name] = theirs.replace("linear_layers", "layers"), change
                break
        else:
            unknown.append(name)
    if unknown:
        raise UserError(f"{len(unknown)} parameters are not in the table: {', '.join(unknown)}.")
    return found


@functools.cache
def _rules(table: Table) -> dict[str, list[tuple[re.Pattern[str], str, Change]]]:
    """The table by our names with every number replaced by `#`, so that few patterns are tried."""
    rules = {}
    for theirs, ours, change in _entries(table):
        pattern = re.compile(re.escape(ours).replace(r"\#", r"(\d+)"))
        rules.setdefault(re.sub(r"\d+", "#", ours), []).append((pattern, theirs, change))
    return rules


def _join(path: tuple) -> str:
    return ".".join(str(key.key) for key in path)
