"""The shipped vocabulary and the demo encoder: what a user of the demo depends on."""

import dataclasses
import hashlib
import pickle

import jax.numpy as jnp
import numpy as np
import pytest

from imagen_jax.config import T5_WIDTHS
from imagen_jax.text import load_encoder, load_tokenizer, tokenize, tokenizer

CAPTIONS = [
    "grinning face",
    "grinning face with big eyes",
    "red heart",
    "blue heart",
    "dog",
    "dog face",
    "cat",
    "pizza",
    "man and woman holding hands",
    "sun behind small cloud",
    "sun behind large cloud",
    "cloud with lightning and rain",
]


@pytest.fixture(scope="module")
def demo():
    return load_encoder("demo")


@pytest.fixture(scope="module")
def pieces():
    return load_tokenizer()


def test_known_ids(pieces):
    tokens = tokenize(pieces, ["translate English to German: The house is wonderful.", "a"])
    assert tokens.shape == (2, 256) and tokens.dtype == np.int32
    known = [13959, 1566, 12, 2968, 10, 37, 629, 19, 1627, 5, 1]
    np.testing.assert_array_equal(tokens[0, :11], known)
    assert not tokens[0, 11:].any()


def test_long_captions_are_cut_before_the_end_token(pieces):
    texts = ["word " * 400, "word"]
    long, short = tokenize(pieces, texts)
    assert np.all(long != 0) and long[-1] == 1 and short[np.flatnonzero(short)[-1]] == 1
    np.testing.assert_array_equal(long[:200], tokenize(pieces, texts, max_length=201)[0, :-1])


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        (["a", "b", " \n", "d"], "caption 3 of 4 is empty"),
        ("a cat", "not one string: 'a cat'"),
    ],
)
def test_captions_that_are_none_are_named(demo, texts, named):
    with pytest.raises(ValueError, match=named):
        demo.tokenize(texts)


@pytest.mark.parametrize(
    ("keeps_padding", "rest"), [(False, ["", "", "green"]), (True, ["", "green", "a green"])]
)
def test_what_is_left_out_of_a_caption(demo, keeps_padding, rest):
    """Where padding is kept the last token that is read is the end; of 256 it always is."""
    encoder = dataclasses.replace(demo, keeps_padding=keeps_padding)
    caption = "a red triangle above a green"
    count = len(demo.tokenizer.encode(caption).ids)
    assert [encoder.left_out(caption, count - n) for n in range(3)] == rest
    assert encoder.left_out("word " * 300, 256).split() == ["word"] * 45


def test_half_an_emoji_is_a_replacement_character(pieces):
    """Legal in JSON, and what an argument that is not UTF-8 becomes."""
    want = tokenize(pieces, ["cat \N{REPLACEMENT CHARACTER}", "\N{GRINNING FACE}"])
    np.testing.assert_array_equal(tokenize(pieces, ["cat \ud83d", "\N{GRINNING FACE}"]), want)
    np.testing.assert_array_equal(tokenize(pieces, ["cat \udce9"])[0], want[0])


def test_embeddings_that_are_not_finite_are_refused(demo):
    """As from a model that overflows in float16."""
    params = demo.params | {"norm": {"scale": jnp.full(128, jnp.nan)}}
    with pytest.raises(ValueError, match="encoder 'demo': the embedding of 'a cat' is not finite"):
        dataclasses.replace(demo, params=params)(["a cat"], length=16)


def test_t5s_own_sentencepiece_file_needs_no_conversion(tmp_path, monkeypatch):
    """Google's v1.1 folders hold nothing else; the checksum stands in for the real file."""
    (tmp_path / "spiece.model").write_bytes(b"as if")
    monkeypatch.setattr(tokenizer, "_T5_SPIECE_SHA256", hashlib.sha256(b"as if").hexdigest())
    ids = load_tokenizer(tmp_path).encode("The house").ids
    assert ids == [37, 629, 1]


def test_the_demo_is_always_the_same(demo):
    """Networks trained on it depend on these numbers."""
    embeds, mask = demo(["a red heart"], length=16)
    assert demo.is_demo and demo.width == embeds.shape[-1] == T5_WIDTHS["demo"]
    assert mask.sum() == 5
    assert demo.sha256[:12] == "de79838f3861"
    pinned = [[-0.8236, 1.1084, -0.2298], [0.0650, 1.1549, -0.9572]]
    np.testing.assert_allclose(embeds[0, :2, :3], pinned, atol=1e-3)
    np.testing.assert_allclose(np.abs(embeds).mean(), 0.250600, rtol=1e-4)


def test_the_demo_tells_captions_apart(demo):
    embeds, mask = map(np.asarray, demo(CAPTIONS, length=16))
    pooled = embeds.sum(1) / mask.sum(1, keepdims=True)
    pooled /= np.linalg.norm(pooled, axis=1, keepdims=True)
    cosines = (pooled @ pooled.T)[~np.eye(len(CAPTIONS), dtype=bool)]
    assert cosines.max() < 0.95 and cosines.mean() < 0.4
    one, other = np.asarray(demo(["dog bites man", "man bites dog"], length=16)[0])
    assert np.abs(one - other).mean() > 0.1  # the order of words counts


@pytest.mark.parametrize("dtype", [jnp.bfloat16, "float16"])
def test_the_demo_in_half_precision(demo, dtype):
    embeds, _ = demo(CAPTIONS, length=16)
    half, _ = load_encoder("demo", dtype=dtype)(CAPTIONS, length=16)
    np.testing.assert_allclose(half, embeds, atol=0.03 * np.abs(embeds).max())


def test_an_unfit_dtype_is_named():
    with pytest.raises(ValueError, match="dtype = int32"):
        load_encoder("demo", dtype=jnp.int32)


def test_the_tokenizer_travels_to_worker_processes(pieces):
    copy = pickle.loads(pickle.dumps(pieces))
    np.testing.assert_array_equal(tokenize(copy, CAPTIONS), tokenize(pieces, CAPTIONS))
