"""`python -m evaluate.composition`: what is drawn is judged, and the report says what of."""

import dataclasses
import json
import sys

import numpy as np
import pytest
from PIL import Image

from evaluate import composition
from imagen_jax.data import scenes
from imagen_jax.errors import UserError
from imagen_jax.pipeline import Embeddings
from tests.sample.conftest import cascade, save_run

FEW = ("--steps", "2", "1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("evaluated") / "tiny", cascade())


@pytest.fixture
def command(monkeypatch):
    def start(run, *arguments):
        monkeypatch.setattr(sys, "argv", ["", "--checkpoint", *map(str, (run, *arguments))])
        composition.main()
        return json.loads((run / "evaluation" / "composition.json").read_text())

    return start


def test_random_weights_are_all_wrong(run, command, capsys):
    report = command(run, "--num-images", "5", *FEW)
    assert set(report["levels"]) == {"pairs", "combinations", "counts", "seen"}
    for level in report["levels"].values():
        assert level["right"]["share"] == 0 and level["right"]["count"] == 5
        assert 0.3 < level["right"]["high"] < 0.5  # of five images
    assert report["options"]["timesteps"] == [2, 1] and report["checkpoint_steps"]["unet1"] == 7
    lines = capsys.readouterr().out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("captions"))
    assert lines[start + 2].startswith("combinations  5       0 % (0-43)")
    assert [line.split()[0] for line in lines[start + 3 : start + 6]] == ["above", "left", "counts"]
    with Image.open(run / "evaluation" / "composition.png") as sheet:
        assert sheet.width > 5 * 96


def test_a_negative_prompt_is_drawn_away_from(tmp_path):
    class Drawn:
        def encode(self, captions, batch_size):
            return captions

        def encode_negative(self, prompts):
            assert prompts == ["y"]
            return Embeddings(np.zeros((1, 2, 4)), np.ones((1, 2), bool))

        def generate(self, embeddings, *, negatives, seeds, **_):
            assert len(negatives.embeds) == len(embeddings) == len(seeds)
            return enumerate(np.zeros((len(seeds), 4, 4, 3)))

    given = composition.Settings(checkpoint=tmp_path, negative_prompt="y")
    chosen = scenes.examples("pairs", 3)
    assert composition.draw(Drawn(), chosen, given, {}, "pairs").shape == (3, 4, 4, 3)


def test_true_images_are_right(run, command, monkeypatch):
    """With the scenes themselves in place of what the cascade draws."""

    def true(pipeline, chosen, given, options, level):
        return np.stack([scene.draw(32) for scene in chosen]) / 255

    monkeypatch.setattr(composition, "draw", true)
    report = command(run, "--num-images", "24", *FEW)
    for level, shares in report["levels"].items():
        assert shares["right"]["share"] == 1, level
    assert report["levels"]["combinations"]["relation"]["count"] == 24
    parts = report["relations"]["combinations"]
    assert set(parts) == {"above", "left of", "inside"}
    assert sum(one["right"]["count"] for one in parts.values()) == 24
    assert all(one["right"]["share"] == 1 for one in parts.values())
    assert report["levels"]["counts"]["relation"]["count"] == 0


def test_images_do_not_depend_on_their_number_or_batch(run, monkeypatch, command):
    drawn = {}
    draw = composition.draw

    def kept(pipeline, chosen, given, options, level):
        images = draw(pipeline, chosen, given, options, level)
        drawn[len(chosen), given.batch_size] = images
        return images

    monkeypatch.setattr(composition, "draw", kept)
    command(run, "--levels", "pairs", "--num-images", "6", "--batch-size", "2", *FEW)
    command(run, "--levels", "pairs", "--num-images", "3", "--batch-size", "4", *FEW)
    np.testing.assert_allclose(drawn[6, 2][:3], drawn[3, 4], atol=1e-5)


def test_mistakes_are_named(run, command, tmp_path):
    with pytest.raises(UserError, match="--num-images 0: must be at least 1."):
        command(run, "--num-images", "0")
    silent = dataclasses.replace(cascade(), condition_on_text=False)
    unets = tuple(dataclasses.replace(u, cond_on_text=False) for u in silent.unets)
    silent = dataclasses.replace(silent, unets=unets, text_encoder_name=silent.text_encoder_name)
    with pytest.raises(UserError, match="needs a cascade with captions and three channels"):
        command(save_run(tmp_path / "silent", silent))
