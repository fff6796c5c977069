"""The demo: what it counts, and, run to the end, that it learns what the README says."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import demo
from evaluate import composition
from imagen_jax import text
from imagen_jax.cascade import Request
from imagen_jax.data import NEW_COMBINATIONS, demo_captions, scenes
from imagen_jax.errors import UserError
from imagen_jax.presets import PRESETS

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


def test_the_sheet_shows_held_out_captions(tmp_path, monkeypatch):
    """With true images in place of what a cascade draws."""

    def measure(given):
        assert given.checkpoint == tmp_path
        chosen = {level: scenes.examples(level, given.num_images) for level in given.levels}
        images = {k: np.stack([s.draw(32) for s in part]) / 255 for k, part in chosen.items()}
        return {k: composition.Measured(chosen[k], images[k], []) for k in chosen}

    def draw(pipeline, prompts, cond_scale):
        assert len(prompts) == len(set(prompts))
        asked = Request(cond_scale=cond_scale).per_unet(PRESETS["scenes"](), "cond_scale")
        assert asked == (1.0, 1.0, 1.0)
        return np.zeros((len(prompts), 32, 32, 3))

    monkeypatch.setattr(demo.composition, "measure", measure)
    monkeypatch.setattr(demo.Pipeline, "load", lambda run: None)
    monkeypatch.setattr(demo, "draw", draw)
    demo.draw_scenes(tmp_path, 9)
    with Image.open(tmp_path / "demo.png") as sheet:
        assert sheet.height > 9 * 100 and sheet.width > 8 * 96


def test_the_sheet_shows_every_relation_and_pair():
    for count in (8, 100):
        chosen = [scene.content for scene in scenes.examples("combinations", count)]
        shown = [chosen[i] for i in demo.spread(chosen)]
        assert len(shown) == 8
        assert {one.relation for one in shown} == {one.relation for one in chosen}
    pairs = [scene.content for scene in scenes.examples("pairs", 100)]
    assert {pairs[i].kind for i in demo.spread(pairs)} == set(scenes.HELDOUT_PAIRS)


def test_the_encoder_is_trained_once(tmp_path, monkeypatch):
    made = []

    def train(given):
        made.append(given)
        return text.load_encoder("demo"), {}

    monkeypatch.setattr(demo.text_encoder, "train", train)
    folder = demo.encoder_folder(tmp_path)
    assert demo.encoder_folder(tmp_path) == folder and len(made) == 1
    assert text.load_encoder(folder).sha256 == text.load_encoder("demo").sha256


@pytest.mark.long
def test_the_demo_draws_what_it_was_shown(tmp_path):
    command = [sys.executable, "demo.py", "--data", "bundled", "--workdir", str(tmp_path / "run")]
    out = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    (right,) = re.findall(r"(\d+) of 64 drawn pictures are nearer to their own", out)
    assert int(right) >= 52, out


def test_stages_train_side_by_side_and_one_that_fails_ends_all(tmp_path, monkeypatch):
    """In processes of their own: two steps that are counted, then a process that fails."""

    def stage(code: str):
        def start(workdir, number, steps, core, *, long):
            return number, subprocess.Popen([sys.executable, "-c", code.format(number=number)])

        return start

    line = '{{"unet": {number}, "step": 2, "kind": "train"}}'
    code = f"open(r'{tmp_path}/metrics{{number}}.jsonl', 'w').write('{line}')"
    monkeypatch.setattr(demo, "start_stage", stage(code))
    assert demo.side_by_side(tmp_path, (2, 2, 2), long=False)
    assert demo.steps_done(tmp_path) == {1: 2, 2: 2, 3: 2}
    (tmp_path / "unet2.log").write_text("lines\nerror: no room\n")
    monkeypatch.setattr(demo, "start_stage", stage("raise SystemExit({number} == 2)"))
    with pytest.raises(UserError, match="U-Net 2: error: no room"):
        demo.side_by_side(tmp_path, (2, 2, 2), long=False)
