"""`python -m evaluate.score`, with a network of random weights."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from PIL import Image

from evaluate import score
from imagen_jax.data import scenes
from imagen_jax.errors import UserError
from imagen_jax.metrics import fid


class Small(nnx.Module):
    """In place of Inception: the means of the colours over a grid of 3 x 3."""

    def __call__(self, x):
        return jax.image.resize(x, (x.shape[0], 3, 3, 3), "linear").reshape(len(x), 27)


@pytest.fixture
def command(monkeypatch, tmp_path):
    monkeypatch.setattr(score, "load_inception", lambda path: Small())

    def start(*arguments):
        out = tmp_path / "scores.json"
        words = ["", "--inception", "unused.pt", "--out", out, *arguments]
        monkeypatch.setattr(sys, "argv", list(map(str, words)))
        score.main()
        return json.loads(out.read_text())

    return start


def folder_of(path, seeds, size=32):
    path.mkdir()
    for seed in seeds:
        Image.fromarray(scenes.training_scene(seed).draw(size)).save(path / f"{seed}.png")
    return path


def test_scores_of_two_folders(command, tmp_path, capsys):
    one, two = folder_of(tmp_path / "a", range(40)), folder_of(tmp_path / "b", range(40, 80))
    found = command("--samples", one, "--reference", two, "--batch-size", "7")
    x, y = (
        np.concatenate(
            [
                np.asarray(Small()(jnp.asarray(score.prepare(scene.draw(32)[None]))))
                for scene in map(scenes.training_scene, part)
            ]
        )
        for part in (range(40), range(40, 80))
    )
    # A folder's order is that of its names; no score depends on it but KID's subsets.
    expected = fid.fid(fid.statistics([x]), fid.statistics([y]))
    np.testing.assert_allclose(found["fid"], expected, rtol=1e-3)
    np.testing.assert_allclose(found["kid"], fid.kid(x, y, subsets=1).mean, rtol=1e-3)
    assert (found["precision"], found["recall"]) == fid.precision_recall(x, y)
    assert found["samples"] == found["reference"] == 40
    assert "40 samples give covariances of less than full rank" in capsys.readouterr().out
    same = command("--samples", one, "--reference", one)
    assert abs(same["fid"]) < 1e-4 * found["fid"] and same["precision"] == 1


def test_statistics_take_the_place_of_images(command, tmp_path):
    one, two = folder_of(tmp_path / "a", range(30)), folder_of(tmp_path / "b", range(30, 60))
    stored = tmp_path / "b.npz"
    command("--samples", two, "--reference", one, "--write-statistics", stored, "--metrics", "fid")
    found = command("--samples", one, "--reference", stored, "--metrics", "fid")
    straight = command("--samples", one, "--reference", two, "--metrics", "fid")
    np.testing.assert_allclose(found["fid"], straight["fid"], rtol=1e-6)
    with pytest.raises(UserError, match="enough only for FID"):
        command("--samples", one, "--reference", stored)


def test_damaged_images_are_counted_and_named(command, tmp_path, capsys):
    one = folder_of(tmp_path / "a", range(12))
    (one / "5.png").write_bytes(b"no image")
    found = command("--samples", one, "--reference", "scenes:counts", "--image-size", "16",
                    "--limit", "12")  # fmt: skip
    assert found["samples"] == 11 and found["reference"] == 12
    assert "1 left out; the first: 5.png: corrupt picture" in capsys.readouterr().out
    with pytest.raises(UserError, match="has no fixed size: give --image-size"):
        command("--samples", "scenes:counts", "--reference", one)


def test_clip_scores_images_with_their_captions(command, tmp_path, monkeypatch, capsys):
    """A stand-in that embeds red in an image, and the word in a text."""

    class Stub:
        def embed_images(self, images):
            red = np.array([image[..., 1].min() < 100 for image in images])
            return np.stack([red, ~red], axis=1).astype(float)

        def embed_texts(self, texts):
            red = np.array(["red" in text for text in texts])
            return np.stack([red, ~red], axis=1).astype(float)

    monkeypatch.setattr(score, "load_clip", lambda folder: Stub())
    folder = tmp_path / "a"
    folder.mkdir()
    for name, value, text in (
        ("0", 0, "red"),
        ("1", 255, "white"),
        ("2", 255, "red"),
        ("3", 0, ""),
    ):
        pixels = np.full((8, 8, 3), 255, np.uint8)
        pixels[..., 1:] = value
        Image.fromarray(pixels).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(text)
    found = command("--samples", folder, "--metrics", "clip", "--clip", "unused")
    assert found["captioned"] == 3 and found["r_precision"] == pytest.approx(2 / 3)
    assert found["clip"] == pytest.approx(200 / 3)
    assert "1 left out; the first: 3.png: empty caption" in capsys.readouterr().out
    with pytest.raises(UserError, match="--metrics fid kid pr needs --reference."):
        command("--samples", folder)


def test_lpips_compares_images_of_one_name(command, tmp_path, capsys):
    """By the package's own weights: equal images are at 0, noisy ones farther the more noise."""
    rng = np.random.default_rng(0)
    folder_of(tmp_path / "true", range(3), size=64)
    shares = {}
    for noise in (0, 8, 32):
        folder = tmp_path / f"noise{noise}"
        folder.mkdir()
        for path in (tmp_path / "true").iterdir():
            pixels = np.asarray(Image.open(path)).astype(float)
            pixels += rng.normal(0, 1, pixels.shape) * noise
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / path.name)
        words = ("--samples", folder, "--reference", tmp_path / "true", "--metrics", "lpips")
        found = command(*words)
        assert found["pairs"] == 3
        shares[noise] = found["lpips"]
    assert shares[0] < 1e-6 < 0.01 < shares[8] < shares[32] < 2
    folder_of(tmp_path / "small", range(3), size=48)
    words = ("--samples", tmp_path / "small", "--reference", tmp_path / "true")
    with pytest.raises(
        UserError, match=r"sizes differ \(48x48 and 64x64 pixels\); --image-size scales both"
    ):
        command(*words, "--metrics", "lpips")
    assert command(*words, "--metrics", "lpips", "--image-size", "48")["pairs"] == 3
    (tmp_path / "small" / "1.png").write_bytes(b"not a picture")
    scaled = (*words, "--metrics", "lpips", "--image-size", "48")
    assert command(*scaled)["pairs"] == 2
    assert "small: 1 left out; the first: 1.png: " in capsys.readouterr().out
    folder_of(tmp_path / "small" / "more", range(1))
    with pytest.raises(UserError, match="small: 0.png and more/0.png have the same name"):
        command(*scaled)
    folder_of(tmp_path / "others", range(5, 7))
    with pytest.raises(UserError, match="have no images with the same name"):
        command("--samples", tmp_path / "others", *words[2:], "--metrics", "lpips")
