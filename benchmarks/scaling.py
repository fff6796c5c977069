"""Memory and communication of a training step as the mesh grows, on emulated devices.

    python -m benchmarks.scaling --out scaling.json    # a CPU, some minutes

Compiles the train step of a small U-Net for 1, 2, 4 and 8 devices, with eight pictures each, and
reads memory and collectives from the compiled program; nothing runs. The ideal: the state
(parameters, average, moments) is split evenly, a device's temporaries are as on one device alone,
and it sends only what FSDP must, with every parameter gathered for the forward pass and for the
backward pass, and its gradient scattered once. Everything is float32; a CPU all-reduces gradients
where a TPU reduce-scatters them, which takes twice the bytes. Arrays of 4096 or more elements are
split here, as the rule splits nearly all arrays of a paper-sized network.
"""

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

from benchmarks.unet import SIZE, UNET

ROWS = 8  # pictures on each device along `data`
MIN_SIZE = 4096
MESHES = ("1x1", "2x1", "4x1", "8x1", "4x2", "2x4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    args = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    emulated = "--xla_force_host_platform_device_count=8"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {emulated}".strip()
    measured = {}
    for mesh in MESHES:
        measured[mesh] = measure(mesh)
        print(mesh, measured[mesh], flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))


def measure(mesh: str) -> dict[str, Any]:
    """Bytes on one device, and bytes that it sends in a step."""
    import jax

    import imagen_jax
    from imagen_jax.sharding import make_layout, parse
    from tools import hlo, programs, report
    from train.settings import Optimization, Settings

    config = imagen_jax.ImagenConfig(
        unets=imagen_jax.UnetConfig(**UNET), image_sizes=SIZE, text_embed_dim=512
    )
    settings = Settings(batch_size=ROWS * parse(mesh)[0], dtype="float32")
    layout = make_layout(mesh, rows=settings.rows, min_size=MIN_SIZE)
    planned = programs.train_step(config.stage(1), settings.section(Optimization), layout)
    executable = planned.traced.lower().compile()
    memory = report.Memory.of(executable)
    moved = report.moved(hlo.collectives(executable.as_text(), layout.mesh.size))
    parts = planned.argument_bytes()
    leaves = jax.tree.leaves(planned.arguments["parameters"])
    split = [x for x in leaves if not x.sharding.is_fully_replicated]
    return {
        "pictures": settings.batch_size,
        "parameters": sum(4 * math.prod(x.shape) for x in leaves),
        "split_parameters": sum(4 * math.prod(x.shape) for x in split),
        "state": sum(parts[name] for name in ("parameters", "their average", "optimiser")),
        "batch": parts["batch"],
        "temporaries": memory.temporaries,
        "total": memory.total,
        "collectives": moved,
        "sent": sum(one["sent"] for one in moved.values()),
    }


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Markdown; the ideal in brackets."""
    alone = measured["1x1"]
    lines = [
        "| mesh | state, MiB | temporaries, MiB | sends, MiB | gather / reduce / other |",
        "|---" * 5 + "|",
    ]
    for mesh, one in measured.items():
        data, model = map(int, mesh.split("x"))
        devices = data * model
        ideal = 3 * one["parameters"] * (1 - 1 / data) / model
        sent = {kind: moved["sent"] for kind, moved in one["collectives"].items()}
        gathered = sent.pop("all-gather", 0)
        reduced = sent.pop("all-reduce", 0) + sent.pop("reduce-scatter", 0)
        kinds = (gathered, reduced, sum(sent.values()))
        cells = [
            mesh,
            f"{_mib(one['state'])} ({_mib(alone['state'] / devices)})",
            f"{_mib(one['temporaries'])} ({_mib(alone['temporaries'] / model)})",
            f"{_mib(one['sent'])} ({_mib(ideal)})",
            " / ".join(map(_mib, kinds)),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _mib(count: float) -> str:
    return f"{count / 2**20:.1f}"


if __name__ == "__main__":
    main()
