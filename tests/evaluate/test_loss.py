"""`python -m evaluate.loss`: the loss that training evaluates, from a run directory."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image

from evaluate import loss
from imagen_jax.errors import UserError
from tests.sample.conftest import cascade, save_run
from tests.train import support
from train import loop


@pytest.fixture(scope="module")
def settings(tmp_path_factory):
    """A run of four steps, evaluated at its end."""
    settings = support.settings(tmp_path_factory.mktemp("evaluated"), eval_batches=3)
    assert loop.run(settings, 1)
    return settings


@pytest.fixture
def command(monkeypatch, settings):
    def start(*arguments, data=settings.data):
        words = ["", "--checkpoint", settings.run, "--data", *data]
        monkeypatch.setattr(sys, "argv", [*map(str, words), *map(str, arguments)])
        loss.main()
        return json.loads((settings.run / "evaluation" / "loss.json").read_text())["loss"]

    return start


@pytest.mark.slow
def test_it_is_the_evaluation_of_training(settings, command, capsys):
    batch = settings.batch_size
    found = command("--num-images", 3 * batch, "--batch-size", batch)["unet1"]
    lines = [json.loads(x) for x in (settings.run / "metrics.jsonl").read_text().splitlines()]
    recorded = [line for line in lines if line.get("kind") == "eval/heldout"][-1]
    np.testing.assert_allclose(found.pop("all"), recorded["loss"], rtol=1e-6)
    for label, value in found.items():
        np.testing.assert_equal(value is None, recorded[f"loss[{label}]"] is None)
        if value is not None:
            np.testing.assert_allclose(value, recorded[f"loss[{label}]"], rtol=1e-5)
    assert "log-SNR       unet1" in capsys.readouterr().out


def test_the_seed_decides_the_noise(command):
    words = ("--num-images", 8, "--batch-size", 8)
    assert command(*words) == command(*words)
    assert command(*words, "--seed", 1) != command(*words)


def test_a_mesh_changes_nothing(command):
    words = ("--num-images", 8, "--batch-size", 8)
    one, many = command(*words)["unet1"], command(*words, "--mesh", "4x2")["unet1"]
    assert one.keys() == many.keys()
    for label, value in one.items():
        if value is not None:
            np.testing.assert_allclose(many[label], value, rtol=1e-5)


def test_a_set_without_held_out_images_is_refused(command):
    with pytest.raises(UserError, match="no image is held out"):
        command(data=("scenes:train",))


def test_stored_embeddings_have_no_use_without_captions(monkeypatch, tmp_path):
    run = save_run(tmp_path / "run", dataclasses.replace(cascade(), condition_on_text=False), (1,))
    rng = np.random.default_rng(0)
    for i in range(8):
        Image.fromarray(rng.integers(256, size=(8, 8, 3), dtype=np.uint8)).save(
            tmp_path / f"{i}.png"
        )
        np.save(tmp_path / f"{i}.npy", np.ones((3, 4), np.float32))
    words = ["", "--checkpoint", run, "--data", tmp_path, "--heldout-fraction", "0.5",
             "--num-images", "4", "--batch-size", "4"]  # fmt: skip
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    loss.main()
    found = json.loads((run / "evaluation" / "loss.json").read_text())["loss"]
    assert found["unet1"]["all"] > 0
