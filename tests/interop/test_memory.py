"""Conversion costs memory for the weights kept once, whatever the file holds besides.

Anonymous memory is what counts: pages of a mapped file are given back when others need them.
`BaseUnet64` in bfloat16 was measured by hand: 3.9 GB for 3.25 GB of weights and 7.1 GB for twice
that (`from-torch`, without and with averages), 3.8 and 8.3 GB (`to-torch`), 4.2 GB and 3.6 GB
(`to-safetensors`, `from-safetensors`); the bound is 1.3 times the weights and 1 GB.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from imagen_jax.config import ImagenConfig, UnetConfig
from imagen_jax.interop import configuration
from tests import SMALLEST_UNET
from tests.interop.states import saved, shapes_of

UNET = UnetConfig(**SMALLEST_UNET | dict(dim=384, dim_mults=(1, 2)), cond_dim=8, max_text_len=6)
CASCADE = ImagenConfig(unets=(UNET,), image_sizes=(8,), text_embed_dim=6)
INTERPRETER = 0.3e9
"""Anonymous bytes of a process that has imported everything and converted nothing: 0.24 GB."""


@pytest.fixture(scope="module")
def big(tmp_path_factory) -> Path:
    """A trainer's file with averages, twice the weights; `big.weights` says how many bytes."""
    shapes = shapes_of(CASCADE.unets[0])
    numbers = np.random.default_rng(0).integers(0, 8192, 1 << 20, np.int16)  # as bfloat16: finite

    def tensor(shape, seed):
        count = int(np.prod(shape))
        values = torch.from_numpy(np.resize(np.roll(numbers, seed), count))
        return values.view(torch.bfloat16).reshape(shape)

    online = {name: tensor(shape, i) for i, (name, shape) in enumerate(shapes.items())}
    mean = {name: tensor(shape, -i) for i, (name, shape) in enumerate(shapes.items())}
    kind, params = configuration.to_theirs(CASCADE)
    ema = {"0.initted": torch.tensor(True), "0.step": torch.tensor(3)}
    ema |= {f"0.online_model.{name}": a for name, a in online.items()}
    ema |= {f"0.ema_model.{name}": a for name, a in mean.items()}
    data = dict(
        model={f"unets.0.{name}": a for name, a in online.items()},
        version="2.1.0",
        steps=torch.tensor([3]),
        ema=ema,
        imagen_type=kind,
        imagen_params=params,
    )
    return saved(tmp_path_factory.mktemp("memory") / "big.pt", data)


# One interpreter for all: each conversion's name is written before it starts, the last is "end".
PROGRAM = """
import json, sys
from imagen_jax.interop.__main__ import main
conversions, begun = json.loads(sys.argv[1]), open(sys.argv[2], "a")
for arguments in conversions:
    print(arguments[0], file=begun, flush=True)
    sys.argv = ["imagen_jax.interop", *arguments]
    main()
print("end", file=begun, flush=True)
"""
# glibc keeps what was freed in an arena, and what is smaller than a threshold that grows.
GIVEN_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}


def peaks_of(conversions: list[tuple], begun: Path) -> list[int]:
    """The most anonymous memory, in bytes, that each conversion holds at any time."""
    begun.touch()
    command = [sys.executable, "-c", PROGRAM, json.dumps(conversions, default=str), str(begun)]
    process = subprocess.Popen(command, env=os.environ | GIVEN_BACK, stdout=subprocess.DEVNULL)
    status, peaks = Path(f"/proc/{process.pid}/status"), dict.fromkeys(range(len(conversions)), 0)
    while process.poll() is None:
        number = len(begun.read_text().splitlines()) - 1
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        if "RssAnon" in fields and number in peaks:  # not while it starts or ends
            peaks[number] = max(peaks[number], 1024 * int(fields["RssAnon"].split()[0]))
        time.sleep(0.005)
    lines = begun.read_text().splitlines()
    assert process.returncode == 0 and lines == [c[0] for c in conversions] + ["end"], lines
    return list(peaks.values())


@pytest.mark.slow
def test_every_direction_holds_the_weights_kept_once(big):
    one = sum(2 * int(np.prod(shape)) for shape in shapes_of(CASCADE.unets[0]).values())
    assert big.stat().st_size > 2 * one > 0.3e9
    folder = big.parent
    run, both, stored = folder / "run", folder / "both", folder / "a.safetensors"
    kept = {
        ("from-torch", big, run, "--weights", "ema"): one,
        ("from-torch", big, both): 2 * one,
        ("to-torch", both, folder / "a.pt"): 2 * one,
        ("to-safetensors", run, stored): one,
        ("from-safetensors", stored, folder / "again"): one,
    }
    peaks = peaks_of(list(kept), folder / "begun")
    for (name, *_), weights, peak in zip(kept, kept.values(), peaks, strict=True):
        allowed = 1.3 * weights + INTERPRETER
        assert 0 < peak <= allowed, f"{name}: {peak / 1e6:.0f} MB > {allowed / 1e6:.0f} MB"
