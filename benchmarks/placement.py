"""Cost of a training step with large feature maps split over the model axis by rows or by channels.

    python -m benchmarks.placement --out placement.json    # a CPU, half an hour

Compiles the train step of each paper-sized stage for 16 emulated devices as 4x4, with one residual
block per level (which keeps the ratio of pixels to weights, but not the time to compile). Feature
maps with at least a given number of rows are split by rows, smaller ones by channels. Nothing runs.
Each result comes from its own process; those already in the file are kept.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

STAGES = ("base", "sr256", "sr1024")
THRESHOLDS = (16, 32, 64, 10**6)  # the last: channels everywhere
MESH, PICTURES = "4x4", 8  # on each of the four along `data`
CROP = 256  # pixels, of the last stage


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the numbers as JSON")
    parser.add_argument(
        "--one", nargs=2, metavar=("STAGE", "ROWS"), help="measure one result in this process"
    )
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]))))
        return
    there = args.out is not None and args.out.exists()
    measured = json.loads(args.out.read_text()) if there else {}
    for stage in STAGES:
        for threshold in THRESHOLDS:
            name = f"{stage}, rows from {threshold}"
            if name in measured:
                continue
            command = [sys.executable, "-m", "benchmarks.placement", "--one", stage, str(threshold)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            measured[name] = json.loads(done.stdout.splitlines()[-1])
            print(name, measured[name], flush=True)
            if args.out:
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(measured, indent=1) + "\n")
    print(table(measured))


def measure(stage: str, threshold: int) -> dict[str, Any]:
    """Bytes on one device, and bytes that it sends in a step."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    emulated = "--xla_force_host_platform_device_count=16"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {emulated}".strip()
    import commands
    from imagen_jax import presets, sharding
    from tools import hlo, programs, report
    from train.settings import Optimization, Settings

    sharding.ROWS_FROM = threshold
    full = presets.PRESETS["imagen"]()
    unets = tuple(dataclasses.replace(unet, num_resnet_blocks=1) for unet in full.unets)
    config = dataclasses.replace(full, unets=unets, random_crop_sizes=(None, None, CROP))
    data, _ = sharding.parse(MESH)
    settings = Settings(
        batch_size=PICTURES * data, dtype="bfloat16", remat="nothing_saveable", mesh=MESH
    )
    layout = sharding.make_layout(MESH, rows=settings.rows)
    one = config.stage(commands.stage_number(stage))
    planned = programs.train_step(one, settings.section(Optimization), layout)
    executable = planned.traced.lower().compile()
    moved = report.moved(hlo.collectives(executable.as_text(), layout.mesh.size))
    return {
        "temporaries": report.Memory.of(executable).temporaries,
        "sent": sum(one["sent"] for one in moved.values()),
        "collectives": moved,
    }


def table(measured: dict[str, dict[str, Any]]) -> str:
    """Markdown: GB sent / GB of temporaries."""
    lines = [
        "| stage | " + " | ".join(_threshold(threshold) for threshold in THRESHOLDS) + " |",
        "|---" * (1 + len(THRESHOLDS)) + "|",
    ]
    for stage in STAGES:
        rows = [measured.get(f"{stage}, rows from {threshold}") for threshold in THRESHOLDS]
        cells = [f"{r['sent'] / 1e9:.1f} / {r['temporaries'] / 1e9:.1f}" if r else "" for r in rows]
        lines.append(f"| {stage} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _threshold(rows: int) -> str:
    return "channels everywhere" if rows == THRESHOLDS[-1] else f"rows from {rows}"


if __name__ == "__main__":
    main()
