"""`python -m evaluate.generate`: resumed after any death, and the same in any batch and mesh."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from evaluate import generate
from imagen_jax import storage
from imagen_jax.data import open_source, scenes
from imagen_jax.errors import UserError
from tests.sample.conftest import cascade, save_run

ROOT = Path(__file__).parents[2]
FEW = ("--steps", "2", "1", "--batch-size", "4")
PROMPTS = [f"prompt {i}" for i in range(10)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("generated") / "tiny", cascade())


@pytest.fixture
def prompts(tmp_path):
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    return tmp_path / "prompts.txt"


@pytest.fixture
def command(monkeypatch, run, prompts):
    def start(out, *arguments, source=prompts):
        words = ["", "--checkpoint", run, "--prompts", source, "--out", out, *FEW, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        generate.main()

    return start


def written(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_one_image_and_its_text_for_each_prompt(command, tmp_path):
    command(tmp_path / "out")
    files = written(tmp_path / "out")
    names = [f"{i:06}.{kind}" for i in range(10) for kind in ("png", "txt")]
    assert list(files) == [*names, "generate.json"]
    assert files["000003.txt"] == b"prompt 3\n"
    assert len(set(files.values())) == 21  # no two are equal
    # The folder is a source, with the prompts as captions.
    source = open_source(tmp_path / "out", heldout_fraction=0.0)
    assert sorted(record.caption for record in source) == PROMPTS


def test_deaths_change_no_byte(command, tmp_path, monkeypatch):
    command(tmp_path / "straight")
    rng, write = random.Random(0), storage.write_bytes
    left = 0

    def dying(path, content):
        nonlocal left
        if left == 0:
            raise KeyboardInterrupt
        left -= 1
        write(path, content)

    deaths = 0
    monkeypatch.setattr(storage, "write_bytes", dying)
    while deaths < 30:
        left = rng.choice([0, 1, 2, 3])  # before an image, or between its text and itself
        try:
            command(tmp_path / "killed")
            break
        except KeyboardInterrupt:
            deaths += 1
    monkeypatch.setattr(storage, "write_bytes", write)
    command(tmp_path / "killed")
    assert deaths >= 8
    assert written(tmp_path / "killed") == written(tmp_path / "straight")


def test_images_of_another_cascade_are_refused(command, tmp_path, run):
    """Of equal settings and steps, from another run."""
    command(tmp_path / "out")
    other = save_run(tmp_path / "other", cascade())
    with pytest.raises(UserError, match="contains images with other settings .model_hash: "):
        command(tmp_path / "out", "--checkpoint", other)


@pytest.mark.long
def test_thirty_kills_change_no_byte(run, prompts, tmp_path):
    """The same with kill -9 of a process of its own, at random moments."""
    words = ["--checkpoint", run, "--prompts", prompts, *FEW]
    command = [sys.executable, "-m", "evaluate.generate", *map(str, words)]
    straight = [*command, "--out", str(tmp_path / "straight")]
    began = time.monotonic()
    subprocess.run(straight, cwd=ROOT, check=True, capture_output=True)
    takes, rng = time.monotonic() - began, random.Random(0)
    for _ in range(30):
        process = subprocess.Popen(
            [*command, "--out", str(tmp_path / "killed")],
            cwd=ROOT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(rng.uniform(0, takes))
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    subprocess.run([*command, "--out", str(tmp_path / "killed")], cwd=ROOT, check=True)
    left_over = {name for name in os.listdir(tmp_path / "killed") if name.startswith(".")}
    killed = {k: v for k, v in written(tmp_path / "killed").items() if k not in left_over}
    assert killed == written(tmp_path / "straight")


def test_neither_batch_nor_mesh_changes_an_image(command, tmp_path):
    command(tmp_path / "one")
    command(tmp_path / "batch", "--batch-size", "3")
    command(tmp_path / "mesh", "--mesh", "4x2")
    for other in ("batch", "mesh"):
        for i in range(10):
            one, two = (
                np.asarray(Image.open(tmp_path / folder / f"{i:06}.png")).astype(int)
                for folder in ("one", other)
            )
            assert np.abs(one - two).max() <= 1


def test_other_settings_are_refused(command, tmp_path):
    command(tmp_path / "out", "--num-images", "2")
    with pytest.raises(UserError, match=r"other settings \(seed: 0 there, 5 now\)"):
        command(tmp_path / "out", "--num-images", "2", "--seed", "5")


def test_prompts_of_scenes_and_of_coco(tmp_path):
    assert generate.read_prompts("scenes:counts", 2) == [
        scenes.heldout_scene("counts", i).caption for i in range(2)
    ]
    notes = [dict(image_id=7, caption=" b "), dict(image_id=3, caption="a")]
    notes.append(dict(image_id=7, caption="another of 7"))
    path = tmp_path / "captions.json"
    path.write_text(json.dumps({"annotations": notes}))
    assert generate.read_prompts(str(path), None) == ["a", "b"]
    path.write_text(json.dumps({"annotations": [1]}))
    with pytest.raises(UserError, match="is not a COCO captions file"):
        generate.read_prompts(str(path), None)
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(UserError, match="contains no prompts"):
        generate.read_prompts(str(tmp_path / "empty.txt"), None)
