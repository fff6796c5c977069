"""Training on stored embeddings is training with the encoder."""

import dataclasses

import numpy as np
import pytest

from imagen_jax.data import embed
from imagen_jax.errors import UserError
from tests.train import support
from train import loop
from train.log import read


def losses(settings) -> list[float]:
    assert loop.run(settings, 1)
    return [line["loss"] for line in read(settings.run) if line.get("kind", "").startswith("t")]


def encoded(folder, **changes):
    """Of the 8 images that the runs here train on, and of those held out."""
    embed.embed(
        embed.Settings(data=("bundled",), t5="demo", out=folder, mesh="1x1", limit=8, **changes)
    )
    return folder


@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [("float32", 1e-6), pytest.param("bfloat16", 1e-3, marks=pytest.mark.slow)],
    ids=["float32", "bfloat16"],
)
def test_the_losses_are_the_same(tmp_path, dtype, tolerance):
    stored = encoded(tmp_path / "stored", store=dtype, compute=dtype)
    changes = dict(dtype=dtype, steps=4, sample_every=4, sample_steps=2)
    online = losses(support.settings(tmp_path, workdir=tmp_path / "online", **changes))
    settings = support.settings(
        tmp_path, workdir=tmp_path / "offline", embeddings=stored, **changes
    )
    np.testing.assert_allclose(losses(settings), online, rtol=tolerance)
    assert len(list((settings.run / "samples").glob("unet1-*4.png"))) == 1
    # A run may continue with the encoder itself, which is the same one.
    assert loop.run(dataclasses.replace(settings, embeddings=None, steps=5, resume=True), 1)


def test_embeddings_that_do_not_fit_are_refused(tmp_path):
    stored = encoded(tmp_path / "stored")
    form = stored / "embeddings.json"
    text = form.read_text()
    for old, new, message in (
        ("128", "64", "has embeddings of width 64, the cascade text_embed_dim = 128"),
        ('"cleans": false', '"cleans": true', "were not encoded as this cascade reads them"),
    ):
        form.write_text(text.replace(old, new))
        with pytest.raises(UserError, match=message):
            loop.run(support.settings(tmp_path, embeddings=stored), 1)
    form.write_text(text)
    assert loop.run(support.settings(tmp_path, embeddings=stored, steps=1), 1)
    identity = stored / "text_encoder.json"
    identity.write_text(identity.read_text().replace('"sha256": "', '"sha256": "00'))
    with pytest.raises(UserError, match="is not that of this run"):
        loop.run(support.settings(tmp_path, embeddings=stored, steps=2, resume=True), 1)
