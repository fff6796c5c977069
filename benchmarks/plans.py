"""Plans of the paper-sized stages for TPU slices: what each needs, and how fast it could be.

    python -m benchmarks.plans            # makes the rows that are missing, one after the other
    python -m benchmarks.plans --rows 1   # the next one only
    python -m benchmarks.plans --table    # what is there, for benchmarks/README.md

Every row is one `python -m train.plan` in a process of its own, an hour at most. A row that dies or
is stopped is recorded with what it showed; `--again NAME` makes one anew. Needs libtpu, no TPU.
"""

import argparse
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "plans.json"
LIMIT = 3600  # seconds of a row

_V5E = ("--topology", "v5e:16x16", "--mesh", "256x1", "--batch-size", "2048")
_IMAGEN = ("--preset", "imagen", "--remat", "nothing_saveable")
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, help="make so many rows, then stop")
    parser.add_argument("--again", choices=ROWS, help="make this row, even if it is there")
    parser.add_argument("--limit", type=int, default=LIMIT, help="seconds that a row may take")
    parser.add_argument("--hlo", type=Path, help="keep the compiled programs in this folder")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the rows that are there")
    args = parser.parse_args()
    made = json.loads(args.out.read_text()) if args.out.exists() else {}
    if args.table:
        print(table(made))
        return
    wanted = [args.again] if args.again else [name for name in ROWS if name not in made]
    for name in wanted[: args.rows]:
        print(name, flush=True)
        made[name] = row(name, args.limit, args.hlo)
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(made, indent=1) + "\n")
        print(made[name]["shown"], flush=True)


def row(name: str, limit: float, hlo: Path | None) -> dict[str, Any]:
    """Runs one plan and says what became of it."""
    command = ["-m", "train.plan", *ROWS[name]]
    keep = []
    if hlo is not None:
        hlo.mkdir(parents=True, exist_ok=True)
        keep = ["--hlo", hlo / f"{name}.txt".replace(" ", "")]
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        numbers, log = Path(folder) / "numbers.json", Path(folder) / "log"
        with log.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *command, "--out", numbers, *keep],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
            try:
                process.wait(limit)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        status = process.returncode
        # Of all rows of this run; each is far above what a small one takes.
        largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return {
            "command": "python " + " ".join(command),
            "status": _status(status, time.perf_counter() - began, limit),
            "seconds": round(time.perf_counter() - began),
            "host_bytes": largest,
            "numbers": json.loads(numbers.read_text()) if numbers.exists() else None,
            "shown": log.read_text()[-5000:],
        }


def table(made: dict[str, dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        "| stage, slice | a device | sends a step | arithmetic | network | utilisation | network's "
        "share | compiled in |",
        "|---" * 8 + "|",
    ]
    for name, one in made.items():
        numbers = one["numbers"]
        minutes = f"{one['seconds'] / 60:.1f} min, {one['host_bytes'] / 2**30:.0f} GiB"
        if numbers is None or "seconds" not in numbers:
            lines.append(f"| {name} | {one['status']} | | | | | | {minutes} |")
            continue
        used, has = numbers["memory"]["total"], numbers["chip"]["hbm"]
        sent = sum(kind["sent"] for kind in numbers["collectives"].values())
        seconds, reached = numbers["seconds"], numbers["utilisation"]
        cells = [
            name,
            f"{used / 2**30:.1f} of {has / 2**30:.0f} GiB",
            f"{sent / 1e9:.2f} GB",
            f"{seconds['compute'] * 1e3:.0f} ms",
            f"{seconds['network'] * 1e3:.0f} ms",
            f"{reached['in_turn']:.0%} to {reached['overlapped']:.0%}",
            f"{numbers['network_share']:.0%}",
            minutes,
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _status(code: int, seconds: float, limit: float) -> str:
    if code == 0:
        return "fits"
    if code == -signal.SIGKILL:
        return f"stopped after {limit / 60:.0f} min" if seconds >= limit else "killed: host memory"
    return f"failed ({code})"


if __name__ == "__main__":
    main()
