"""The demo: what it counts, and, run to the end, that it learns what the README says."""

import functools
import json
import os
import re
import signal
import subprocess
import sys
import time
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


def test_a_long_second_stage_learns_inside_first(tmp_path, monkeypatch):
    """A third of its steps, in a run of its own from whose weights the other two thirds begin; one
    that is interrupted ends both."""
    given = []

    def run(settings, number):
        given.append((settings, number))
        return len(given) != 5

    monkeypatch.setattr(demo.loop, "run", run)
    train = functools.partial(demo.train_scenes, tmp_path, tmp_path / "t5", steps=(10, 90, 20))
    assert train(number=2, long=True)
    (first, _), (then, number) = given
    assert (first.workdir, first.data, first.steps) == (tmp_path / "inside", ("scenes:inside",), 30)
    assert (then.workdir, then.data, then.steps) == (tmp_path, ("scenes",), 60)
    assert (first.init_from, then.init_from, number) == (None, tmp_path / "inside", 2)
    assert first.cosine_decay_max_steps == 30 and first.lr == then.lr == demo.INSIDE_LR
    assert train(number=1, long=True) and train(number=2, long=False)
    assert [(one.steps, one.init_from) for one, _ in given[2:]] == [(10, None), (90, None)]
    assert not train(number=2, long=True) and len(given) == 5


CLOSED = """
import subprocess, sys, demo, commands
from pathlib import Path

def start(workdir, number, steps, core, *, long):
    code = "import time; print('ready', flush=True); time.sleep(300)"
    said = open(workdir / f"unet{number}.log", "w")
    process = subprocess.Popen([sys.executable, "-c", code], stdout=said, start_new_session=True)
    print(process.pid, flush=True)
    return number, process

demo.start_stage, demo.encoder_folder = start, lambda workdir: workdir
sys.argv = ["demo.py", "--workdir", sys.argv[1]]
commands.run(demo.main)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGHUP", "SIGTERM"])
def test_a_closed_terminal_ends_the_stages(tmp_path, name):
    """As Ctrl-C does: none goes on alone."""
    command = [sys.executable, "-c", CLOSED, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    stage = int(process.stdout.readline())
    until = time.monotonic() + 60
    while not (tmp_path / "unet2.log").read_text() and time.monotonic() < until:
        time.sleep(0.1)
    process.send_signal(getattr(signal, name))
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "The same command resumes from there." in rest
    for pid in (stage, *map(int, re.findall(r"^\d+$", rest, re.M))):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_progress_counts_the_steps_on_inside(tmp_path):
    for folder, step in (("inside", 30), (".", 7)):
        (tmp_path / folder).mkdir(exist_ok=True)
        lines = [{"unet": 2, "step": one, "kind": "train"} for one in range(1, step + 1)]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / folder / "metrics.jsonl").write_text(text)
    assert demo.steps_done(tmp_path) == {2: 37}
