"""`python -m train.text_encoder`: captions alone teach which wordings mean the same."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import text
from imagen_jax.data import scenes
from train import text_encoder

WORDS = ["a red circle above a blue square", "three small green crosses", "a star"]


@pytest.fixture(scope="module")
def trained():
    given = text_encoder.Settings(out=Path(), steps=40, batch_size=32)
    return text_encoder.train(given)


def test_it_learns_which_wordings_mean_the_same(trained):
    """Forty steps, against the random encoder; which finds a third by their words alone."""
    before = text_encoder.retrieval(text.load_encoder("demo"))
    after = text_encoder.retrieval(trained)
    assert before < 0.4 and after > before + 0.2


def test_what_is_held_out_is_not_trained_on():
    rng = np.random.default_rng(0)
    contents = text_encoder.draw_contents(4000, rng)
    assert {content.level for content in contents} == {None}
    assert len({content.relation for content in contents}) == 4


def test_a_rebound_content_has_the_same_words():
    rng = np.random.default_rng(0)
    content = scenes.seen_scene(1).content
    assert content.kind.shape != content.other.shape
    for _ in range(10):
        other = text_encoder.rebound(content, rng)
        assert other != content
        for field in ("colour", "shape"):
            one, two = (
                sorted(getattr(k, field) for k in (c.kind, c.other)) for c in (content, other)
            )
            assert one == two


def test_the_folder_reads_back_here(trained, tmp_path):
    text.save_encoder(trained, tmp_path / "t5")
    again = text.load_encoder(tmp_path / "t5")
    assert again.sha256 == trained.sha256 and again.config == trained.config
    for one, two in zip(again(WORDS), trained(WORDS), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_loss_is_the_cross_entropy_of_the_matches(trained):
    """By hand, in NumPy: two of three contents are the same."""
    ids = trained.tokenize(WORDS)[:, :20]
    same = np.array([[True, True, False], [True, True, False], [False, False, True]])
    loss = text_encoder.contrastive_loss(
        trained.params, trained.config, jnp.asarray(ids), jnp.asarray(ids), jnp.asarray(same)
    )
    embeds, mask = trained(WORDS)
    mean = embeds.sum(1) / mask.sum(1, keepdims=True)
    mean /= np.linalg.norm(mean, axis=1, keepdims=True)
    logits = mean @ mean.T / text_encoder.TEMPERATURE
    log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    expected = -np.mean((log_p * same / same.sum(1, keepdims=True)).sum(1))
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_the_command_writes_what_t5_takes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "t5"
    words = ["", "--out", str(out), "--steps", "2", "--batch-size", "8"]
    monkeypatch.setattr(sys, "argv", words)
    text_encoder.main()
    assert "is the nearest of" in capsys.readouterr().out
    first = text.load_encoder(out)
    text_encoder.main()
    assert text.load_encoder(out).sha256 == first.sha256  # a function of its settings
    assert not jax.tree.all(
        jax.tree.map(jnp.array_equal, first.params, text.load_encoder("demo").params)
    )
