"""Plans the paper-sized stages for TPU slices: the table in benchmarks/README.md.

    python -m benchmarks.plans              # every row, one after the other: hours on a CPU
    python -m benchmarks.plans "base 64, v5e:16x16"

Each row is one `python -m tools.plan` in its own process. Needs libtpu, but no TPU.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_V5E = ("--topology", "v5e:16x16", "--mesh", "256x1", "--batch-size", "2048")
_IMAGEN = ("--preset", "imagen", "--optimizer", "adam", "--remat", "nothing_saveable")
ROWS = {
    "base 64, v5e:16x16": (*_IMAGEN, "--unet-number", "base", *_V5E),
    "64 -> 256, v5e:16x16": (*_IMAGEN, "--unet-number", "sr256", *_V5E),
    "256 -> 1024, v5e:16x16": (*_IMAGEN, "--unet-number", "sr1024", *_V5E),
    "T5-XXL, v5e:16x16": ("--text", *_V5E),
    "base 64, v5p:4x4x4": (
        *(*_IMAGEN, "--unet-number", "base"),
        *("--topology", "v5p:4x4x4", "--mesh", "64x1", "--batch-size", "512"),
    ),
    "base 64, v6e:16x16": (
        *(*_IMAGEN, "--unet-number", "base"),
        *("--topology", "v6e:16x16", "--mesh", "256x1", "--batch-size", "2048"),
    ),
}
COLUMNS = (
    "stage, slice|a device|sends a step|arithmetic|network|utilisation|network's share|compiled in"
)


def main() -> None:
    columns = COLUMNS.split("|")
    print(f"| {' | '.join(columns)} |\n{'|---' * len(columns)}|", flush=True)
    for name in sys.argv[1:] or ROWS:
        print(f"| {' | '.join([name, *row(ROWS[name])])} |", flush=True)


def row(flags: tuple[str, ...]) -> list[str]:
    """Runs one plan; its numbers, or what became of it."""
    command = [sys.executable, "-m", "tools.plan", *flags]
    print("python", *command[1:], file=sys.stderr, flush=True)
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "numbers.json"
        done = subprocess.run([*command, "--out", str(file)], stdout=sys.stderr)
        numbers = json.loads(file.read_text()) if file.exists() else {}
    host = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20  # the largest so far
    took = f"{(time.perf_counter() - began) / 60:.1f} min, {host:.0f} GiB"
    if "seconds" not in numbers:
        return [f"failed ({done.returncode})", *[""] * 5, took]
    seconds, reached = numbers["seconds"], numbers["utilisation"]
    return [
        f"{numbers['memory']['total'] / 2**30:.1f} of {numbers['chip']['hbm'] / 2**30:.0f} GiB",
        f"{sum(kind['sent'] for kind in numbers['collectives'].values()) / 1e9:.2f} GB",
        f"{seconds['compute'] * 1e3:.0f} ms",
        f"{seconds['network'] * 1e3:.0f} ms",
        f"{reached['in_turn']:.0%} to {reached['overlapped']:.0%}",
        f"{numbers['network_share']:.0%}",
        took,
    ]


if __name__ == "__main__":
    main()
