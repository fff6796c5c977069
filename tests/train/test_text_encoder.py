"""`python -m train.text_encoder`: captions alone teach what they say."""

import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax import text
from imagen_jax.data import scenes
from imagen_jax.data.scenes import Content, Kind
from imagen_jax.errors import UserError
from train import text_encoder

WORDS = ["a red circle above a blue square", "three small green crosses", "a star"]


@pytest.fixture(scope="module")
def trained():
    return text_encoder.train(text_encoder.Settings(out=Path(), steps=100, batch_size=32))


def test_it_learns_to_read(trained):
    """A hundred small steps: colours, shapes and relations of single objects and of two."""
    encoder, reading = trained
    seen = tuple(scenes.seen_scene(i).content for i in range(200))
    rng = np.random.default_rng(0)
    ids = text_encoder.tokens(encoder, list(seen), rng)
    logits = text_encoder.read((encoder.params, reading), encoder.config, ids)
    answers = text_encoder.answers_of(list(seen))
    right = {k: np.mean(np.asarray(logits[k]).argmax(1) == answers[k]) for k in logits}
    assert right["relation"] > 0.9 and right["count"] == 1
    assert right["shape"] > 0.4 and right["colour"] > 0.4  # of five, and of six
    by_colour = np.mean([right[f"shape of {colour}"] for colour in scenes.COLOURS])
    assert by_colour > 0.8  # a third of the colours is there: 0.67 would be "none" throughout
    assert 0 <= text_encoder.accuracy(encoder, reading, scenes.contents("combinations")) < 1


def test_captions_name_sizes_as_often_as_asked():
    for sized in (scenes.SIZED, text_encoder.SIZED):
        contents = [scenes.training_content(i, sized) for i in range(2000)]
        named = [c.size or c.other_size for c in contents if c.relation in ("above", "left of")]
        assert abs(np.mean([one is not None for one in named]) - sized) < 0.05


def test_the_answers_are_what_is_said():
    content = Content(
        Kind("red", "star"), relation="inside", other=Kind("blue", "circle"), other_size="large"
    )
    found = text_encoder.answers_of([content])
    said = {name: text_encoder.SAID[name][int(found[name][0])] for name in found}
    of_colours = {
        f"{what} of {one}": None for what in ("shape", "size", "role") for one in scenes.COLOURS
    }
    of_colours |= {"shape of red": "star", "role of red": "first inside"}
    of_colours |= {
        "shape of blue": "circle",
        "role of blue": "other inside",
        "size of blue": "large",
    }
    assert said == of_colours | dict(
        colour="red", shape="star", size=None, count=1, place=None, relation="inside",
        other_colour="blue", other_shape="circle", other_size="large",
    )  # fmt: skip


def test_the_loss_is_a_sum_of_cross_entropies(trained):
    """By hand, in NumPy."""
    encoder, reading = trained
    contents = [scenes.training_scene(i).content for i in range(5)]
    captions = [scenes.caption(one, np.random.default_rng(0)) for one in contents]
    ids = encoder.tokenize(captions)[:, : text_encoder.LENGTH]
    answers = text_encoder.answers_of(contents)
    loss = text_encoder.reading_loss((encoder.params, reading), encoder.config, ids, answers)
    embeds, mask = encoder(captions)
    mean = embeds.sum(1) / mask.sum(1, keepdims=True)
    expected = 0.0
    for name, matrix in reading.items():
        logits = mean @ np.asarray(matrix)
        log_p = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        expected -= np.mean(log_p[np.arange(5), answers[name]])
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_the_folder_reads_back_here(trained, tmp_path):
    encoder, _ = trained
    text.save_encoder(encoder, tmp_path / "t5")
    again = text.load_encoder(tmp_path / "t5")
    assert again.sha256 == encoder.sha256 and again.config == encoder.config
    for one, two in zip(again(WORDS), encoder(WORDS), strict=True):
        np.testing.assert_array_equal(one, two)


def test_the_command_writes_what_t5_takes(tmp_path, monkeypatch, capsys):
    out = tmp_path / "t5"
    words = ["", "--out", str(out), "--steps", "2", "--batch-size", "8"]
    monkeypatch.setattr(sys, "argv", words)
    text_encoder.main()
    assert "% of held-out combinations are read completely right." in capsys.readouterr().out
    first = text.load_encoder(out)
    with pytest.raises(UserError, match="t5 contains an encoder: choose another --out"):
        text_encoder.main()
    words.append("--overwrite")
    text_encoder.main()
    assert text.load_encoder(out).sha256 == first.sha256  # a function of its settings
    assert not jax.tree.all(
        jax.tree.map(jnp.array_equal, first.params, text.load_encoder("demo").params)
    )
