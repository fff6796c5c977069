"""Describes what is in a checkpoint, as text."""

import json
import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.interop import imagen_pytorch, keys, safetensors_file
from imagen_jax.interop.run_dir import RunDir


def summary(config: ImagenConfig) -> str:
    """`2 U-Nets (64 -> 256 pixels), 2,357,778,870 parameters`."""
    count = sum(
        math.prod(leaf.shape)
        for unet in config.unets
        if not isinstance(unet, NullUnetConfig)
        for leaf in jax.tree.leaves(keys.target(unet))
    )
    sizes = " -> ".join(map(str, config.image_sizes))
    many = "s" if len(config.unets) > 1 else ""
    return f"{len(config.unets)} U-Net{many} ({sizes} pixels), {count:,} parameters"


def describe(path: Path, config: Path | None = None) -> str:
    """Networks, sizes, dtypes, steps and configuration of a file or a run directory.

    Raises ValueError for anything else.
    """
    if path.is_dir():
        run = RunDir.open(path)
        rows = [
            (number, which, step, run.params(number, which))
            for number, step in run.steps.items()
            for which in ("ema", "online")
            if run.has(number, which)
        ]
        text = _text("run directory", run.config, rows, run.origin)
        return "\n".join([*(f"note: {note}" for note in run.notes), text])
    if path.suffix == ".safetensors":
        contents = safetensors_file.read(path)
        rows = [
            (number, contents.weights, contents.steps[number], params)
            for number, params in contents.params.items()
        ]
        return _text("safetensors file of imagen-jax", contents.config, rows, None)
    source = imagen_pytorch.read(path, config)
    rows = [
        (i + 1, which, source.origin["steps"][i], state)
        for i in range(len(source.config.unets))
        for which, states in (("ema", source.ema), ("online", source.online))
        if states is not None
        for state in [states[i]]
    ]
    return _text("file of imagen-pytorch", source.config, rows, source.origin)


def _text(kind: str, config: ImagenConfig, rows: list[tuple], origin: Mapping | None) -> str:
    lines = [f"{kind}: {summary(config)}"]
    if origin is not None:
        lines.append(f"imagen-pytorch {origin['version'] or 'of unknown version'}")
    if config.elucidated is not None:
        lines.append("elucidated (EDM)")
    for number, which, step, tree in rows:
        lines.append(f"U-Net {number}, {which:<6} step {step:>9,}: {_tensors(tree)}")
    missing = set(range(1, len(config.unets) + 1)) - {row[0] for row in rows}
    lines += [f"U-Net {number}: no weights" for number in sorted(missing)]
    return "\n".join([*lines, json.dumps(config.to_dict(), indent=2)])


def _tensors(tree: Any) -> str:
    leaves = jax.tree.leaves(tree)
    dtypes = Counter(str(leaf.dtype) for leaf in leaves)
    size = sum(leaf.nbytes for leaf in leaves)
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items())
    return f"{kinds} tensors, {size / 1e6:,.1f} MB"
