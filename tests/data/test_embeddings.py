"""Captions encoded once: what is stored, and what an interruption or another encoder does."""

import dataclasses
import itertools
import json
import os

import ml_dtypes
import numpy as np
import pytest

from imagen_jax import text
from imagen_jax.data import Embeddings, embed, embeddings, make_batches, open_source
from imagen_jax.data.embeddings import Form
from imagen_jax.errors import UserError

CAPTIONS = ("a dog", "a cat", "a dog", "three small green triangles", "naïve")


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    from PIL import Image

    for i, caption in enumerate(CAPTIONS):
        Image.new("RGB", (8, 8), (i, i, i)).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(caption)
    Image.new("RGB", (8, 8)).save(folder / "none.png")
    return folder


def settings(pictures, **changes) -> embed.Settings:
    plain = embed.Settings(
        data=(str(pictures),), t5="demo", out=pictures.parent / "stored", store="float32",
        heldout_fraction=0.0, batch_size=2, mesh="1x1", compute="float32",
    )  # fmt: skip
    return dataclasses.replace(plain, **changes)


@pytest.mark.parametrize(("dtype", "error"), [("float32", 0), ("bfloat16", 4e-3), ("int8", 8e-3)])
def test_what_is_stored(dtype, error):
    form = Form(width=64, dtype=dtype)
    embeds = np.random.default_rng(0).normal(size=(7, 64)).astype(np.float32)
    record = form.pack(embeds)
    assert len(record) == form.size(7) == {"float32": 1792, "bfloat16": 896, "int8": 476}[dtype]
    found = form.unpack(record).astype(np.float32)
    assert np.abs(found - embeds).max() <= error * np.abs(embeds).max()
    zeros = np.zeros((1, 64), np.float32)
    np.testing.assert_array_equal(form.unpack(form.pack(zeros)), zeros)
    for damaged in (b"", record[:-1]):
        with pytest.raises(UserError, match="is damaged"):
            form.unpack(damaged)


def test_padding_can_be_left_out():
    """Where it is kept, a network that masks it reads the tokens alone."""
    form = Form(width=64, keeps_padding=True)
    embeds = np.random.default_rng(0).normal(size=(7, 64)).astype(ml_dtypes.bfloat16)
    record = form.pack(embeds, 3)
    np.testing.assert_array_equal(form.unpack(record), embeds)
    np.testing.assert_array_equal(form.unpack(record, padding=False), embeds[:3])
    older = record[:-4]
    np.testing.assert_array_equal(form.unpack(older), embeds)
    with pytest.raises(UserError, match="without its number of tokens"):
        form.unpack(older, padding=False)
    plain = Form(width=64)
    np.testing.assert_array_equal(plain.unpack(plain.pack(embeds), padding=False), embeds)


def test_several_processes_share_the_captions(pictures, monkeypatch):
    """Whatever the order and however often each starts; one of them is interrupted."""
    alone = embed.embed(settings(pictures, out=pictures.parent / "alone"))
    monkeypatch.setattr(embed, "SHARD_BYTES", 1)  # a caption each
    assert len(embed.embed(settings(pictures, part="1/2"))) == 2
    (pictures.parent / "stored" / "00003.npy").unlink()
    for part in ("0/2", "0/2", "1/2"):
        stored = embed.embed(settings(pictures, part=part))
    assert len(stored) == 4 and len([*(pictures.parent / "stored").glob("*.npy")]) == 4
    for caption in CAPTIONS:
        np.testing.assert_allclose(stored[caption], alone[caption], atol=2e-6)
    for part in ("2/2", "1", "-1/2", "a/b"):
        with pytest.raises(UserError, match=f"--part {part}: write I/N"):
            settings(pictures, part=part)


def test_each_caption_is_encoded_once(pictures, capsys):
    stored = embed.embed(settings(pictures))
    assert len(stored) == 4
    said = capsys.readouterr().out
    assert "1 images have no caption; the first: none.png: no caption" in said
    assert "0 captions are already stored in" in said and "4 are not" in said
    encoder = text.load_encoder("demo")
    for caption in CAPTIONS:
        embeds, mask = encoder([caption])
        np.testing.assert_allclose(stored[caption], embeds[mask], atol=2e-6)
    assert "a horse" not in stored
    with pytest.raises(UserError, match="no stored embedding for its caption, 'a horse'"):
        stored["a horse"]
    (pictures / "5.txt").write_text("a horse")
    (pictures / "none.png").rename(pictures / "5.png")
    assert len(embed.embed(settings(pictures))) == 5
    assert "4 captions are already stored in" in capsys.readouterr().out
    assert len(list((pictures.parent / "stored").glob("*.array_record"))) == 2


def test_an_interruption_loses_a_shard_at_most(pictures, monkeypatch):
    monkeypatch.setattr(embed, "SHARD_BYTES", 1)  # a caption each
    whole, count = embeddings.storage.write_bytes, itertools.count()

    def killed(path, data):
        if next(count) == 4:  # two descriptions, then the hashes of two shards
            raise KeyboardInterrupt
        whole(path, data)

    monkeypatch.setattr(embeddings.storage, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        embed.embed(settings(pictures))
    monkeypatch.setattr(embeddings.storage, "write_bytes", whole)
    out = pictures.parent / "stored"
    before = {path: path.read_bytes() for path in out.glob("*.npy")}
    assert 0 < len(Embeddings.open(out)) == len(before) < 4
    assert len(list(out.glob("*.array_record"))) == len(before) + 1
    stored = embed.embed(settings(pictures))
    assert len(stored) == 4 and all(len(stored[caption]) for caption in CAPTIONS)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_another_encoder_or_form_is_refused(pictures, monkeypatch, tmp_path):
    embed.embed(settings(pictures))
    with pytest.raises(UserError, match=r"contains embeddings stored as Form\(.*, not Form\("):
        embed.embed(settings(pictures, store="int8"))
    identity = json.loads((tmp_path / "stored/text_encoder.json").read_text())
    identity["sha256"] = "0" * 64
    (tmp_path / "stored/text_encoder.json").write_text(json.dumps(identity))
    with pytest.raises(UserError, match="its weights differ"):
        embed.embed(settings(pictures))
    with pytest.raises(UserError, match="give --t5 or --config to choose"):
        embed.embed(settings(pictures, t5=None))
    with pytest.raises(UserError, match="contains no stored embeddings: create them with"):
        Embeddings.open(tmp_path)
    monkeypatch.setattr(embed.shutil, "disk_usage", lambda _: os.statvfs_result)
    full = type("Usage", (), {"free": 100})
    monkeypatch.setattr(embed.shutil, "disk_usage", lambda _: full)
    with pytest.raises(UserError, match="do not fit, 100 B are free. --store int8 takes less"):
        embed.embed(settings(pictures, out=tmp_path / "more"))


def test_batches_have_them_in_place_of_tokens(pictures):
    stored = embed.embed(settings(pictures, store="bfloat16"))
    (pictures / "1.txt").write_text("unknown")
    left_out = {}
    source = open_source(pictures, heldout_fraction=0.0)
    options = dict(image_size=8, batch_size=4, seed=0, shuffle=False, text_len=12)
    for workers in (0, 2):
        with make_batches(
            source, embeddings=stored, on_skip=left_out.__setitem__, workers=workers, **options
        ) as batches:
            batch = next(batches)
        assert batch["text_embeds"].shape == (4, 12, 128) and batch["text_embeds"].itemsize == 2
        for row, caption in enumerate(("a dog",) * 3 + ("three small green triangles",)):
            length = batch["text_masks"][row].sum()
            np.testing.assert_array_equal(batch["text_embeds"][row, :length], stored[caption][:12])
            assert not batch["text_embeds"][row, length:].any()
    assert left_out["1.png"] == "no stored embedding for its caption, 'unknown'"
