"""The demo: what it counts, and, run whole, that it learns what the README says."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import demo
from imagen_jax.data import NEW_COMBINATIONS, demo_captions

ROOT = Path(__file__).parents[1]


def test_nearest_finds_each_picture_among_all():
    real = demo.real_pictures(demo_captions(), 8)
    noise = np.random.default_rng(0).normal(size=real.shape) * 0.02
    assert demo.nearest(real + noise, real).tolist() == list(range(64))
    assert demo.nearest(np.roll(real, 1, axis=0), real).tolist() == [63, *range(63)]


def test_the_grid_shows_every_picture(tmp_path):
    captions = demo_captions()
    real = demo.real_pictures(captions, 8)
    drawn = np.concatenate([real, real[: len(NEW_COMBINATIONS)]])
    demo.show(tmp_path / "demo.png", captions, real, drawn)
    assert (tmp_path / "demo.png").stat().st_size > 50_000


@pytest.mark.long
def test_the_demo_draws_what_it_was_shown(tmp_path):
    command = [sys.executable, "demo.py", "--workdir", str(tmp_path / "run")]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (right,) = re.findall(r"(\d+) of 64 drawn pictures are nearer to their own", out)
    assert int(right) >= 52, out
