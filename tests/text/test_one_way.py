"""A caption has one embedding, whichever way it takes: that of the reference, at 256 tokens.

The reference's U-Net cuts long embeddings as ours does: tests/nn/test_unet_parity.py.
"""

import dataclasses
import shutil
import types
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from imagen_jax import Imagen, UnetConfig, nn, presets, run_config, sharding, storage, text
from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.data import Opening
from imagen_jax.errors import UserError
from imagen_jax.interop.reference import import_imagen_pytorch
from imagen_jax.pipeline import Pipeline
from imagen_jax.text import Identity, read_beside, tokenizer
from tests import SMALLEST_UNET
from train import command_line
from train.feed import Feed
from train.settings import Data, Optimization, Settings

import_imagen_pytorch()  # it mends torchvision, which transformers' models import

WORDS = "cat dog red blue house tree water fire".split()
CAPTIONS = [" ".join(WORDS[i * i % 8] for i in range(count)) for count in (299, 59)]
WIDTH = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A small T5 with T5's vocabulary, every tensor random."""
    torch.manual_seed(0)
    fields = dict(d_model=WIDTH, d_kv=7, d_ff=40, num_layers=2, num_heads=3)
    model = transformers.T5EncoderModel(transformers.T5Config(vocab_size=32128, **fields))
    with torch.no_grad():
        for name, tensor in model.named_parameters():
            tensor.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
    path = tmp_path_factory.mktemp("t5")
    model.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def reference(folder) -> tuple[np.ndarray, np.ndarray]:
    """What imagen-pytorch's `t5_encode_text` gives for CAPTIONS."""
    import imagen_pytorch.t5

    pieces = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer._BUNDLED),
        pad_token="<pad>",
        eos_token="</s>",
        model_max_length=imagen_pytorch.t5.MAX_LENGTH,
    )
    # transformers 5 has no such method any more.
    shim = types.SimpleNamespace(batch_encode_plus=lambda *args, **given: pieces(*args, **given))
    model = transformers.T5EncoderModel.from_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(imagen_pytorch.t5, "get_model_and_tokenizer", lambda _: (model, shim))
        found = imagen_pytorch.t5.t5_encode_text(CAPTIONS, name="any", return_attn_mask=True)
    return tuple(x.numpy() for x in found)


def cascade(folder: Path, max_text_len: int) -> ImagenConfig:
    unet = UnetConfig(**SMALLEST_UNET, cond_dim=8, max_text_len=max_text_len)
    return dataclasses.replace(
        presets.tiny(), unets=(unet, unet), text_encoder_name=str(folder), text_embed_dim=WIDTH
    )


@pytest.fixture
def pictures(tmp_path) -> Path:
    path = tmp_path / "pictures"
    path.mkdir()
    for i, caption in enumerate(CAPTIONS):
        Image.new("RGB", (16, 16)).save(path / f"{i}.png")
        (path / f"{i}.txt").write_text(caption)
    return path


def open_feed(
    config: ImagenConfig, data: Path, recorded: Identity | None = None, **changes
) -> Feed:
    settings = Settings(
        data=(str(data),), batch_size=2, heldout_fraction=0.0, dtype="float32", **changes
    )
    sections = (settings.section(Data), settings.section(Optimization))
    layout = sharding.make_layout("2x1")
    return Feed.open(config, config.stage(1), *sections, layout, seed=0, recorded=recorded)


def conditioning(feed: Feed) -> tuple[np.ndarray, np.ndarray]:
    (batch,) = feed.evaluation(feed.train, 1)
    return np.asarray(batch["text_embeds"]), np.asarray(batch["text_masks"])


@pytest.mark.parametrize("max_text_len", [8, 16, 32])
def test_every_way_gives_the_references_embeddings(
    max_text_len, folder, reference, pictures, tmp_path
):
    assert reference[1].sum(1).tolist() == [256, 60]
    config = cascade(folder, max_text_len)
    run_config.write(tmp_path / "run", config)
    unets = [nn.NullUnet(), nn.NullUnet()]
    ways = {
        "library": Imagen(config, unets=unets).encode_text(CAPTIONS),
        "pipeline": Pipeline.load(tmp_path / "run", dtype="float32").encode(CAPTIONS),
        "mesh": Pipeline.load(tmp_path / "run", mesh="2x1", dtype="float32").encode(CAPTIONS),
        "training": conditioning(open_feed(config, pictures)),
    }
    encoder = text.load_encoder(folder)
    for i, (embeds, mask) in enumerate(zip(*encoder(CAPTIONS), strict=True)):
        np.save(pictures / f"{i}.npy", embeds[mask])
    encoder.identity.write(pictures)
    ways["stored"] = conditioning(open_feed(config, pictures))
    scale = np.abs(reference[0]).max()
    for name, (embeds, mask) in ways.items():
        want, kept = (x[:, :max_text_len] for x in reference)
        np.testing.assert_allclose(embeds, want, atol=1e-5 * scale, err_msg=name)
        np.testing.assert_array_equal(mask, kept, err_msg=name)


def test_a_caption_is_the_same_among_longer_ones(folder):
    """Fewer columns of padding are encoded for short captions: 32, 64, 128 or 256."""
    encoder = text.load_encoder(folder)
    alone, together = (encoder(texts, length=60)[0][-1] for texts in (CAPTIONS[1:], CAPTIONS))
    np.testing.assert_allclose(alone, together, atol=1e-5 * np.abs(together).max())
    lengths = [1, 32, 33, 64, 65, 128, 129, 256]
    shapes = [
        text.trim(np.ones((2, 256), np.int32) * (np.arange(256) < length)).shape
        for length in lengths
    ]
    assert shapes == [(2, n) for n in (32, 32, 64, 64, 128, 128, 256, 256)]


def test_the_length_of_a_cascade():
    """The longest of its U-Nets, at most 256; a NullUnet reads nothing."""
    long, short = (UnetConfig(**SMALLEST_UNET, max_text_len=n) for n in (512, 8))
    for unets, length in (((long, short), 256), ((NullUnetConfig(), short), 8)):
        config = dataclasses.replace(presets.tiny(), unets=unets)
        assert config.text_len == length


def test_an_encoder_may_move(folder, tmp_path):
    """A run knows it by its weights, not by the folder that they were in."""
    config, encoder = cascade(folder, 8), text.load_encoder(folder)
    moved = dataclasses.replace(config, text_encoder_name="elsewhere")
    run_config.write(tmp_path / "unknown", config)
    with pytest.raises(UserError, match="another cascade: text_encoder_name"):
        run_config.check(tmp_path / "unknown", moved)
    run_config.write(tmp_path / "run", config, text_encoder=encoder.identity)
    run_config.write(tmp_path / "run", moved, text_encoder=encoder.identity)
    assert run_config.read(tmp_path / "run") == moved
    other = dataclasses.replace(encoder.identity, sha256="b" * 64)
    with pytest.raises(UserError, match="is not"):
        run_config.write(tmp_path / "run", config, text_encoder=other)


def test_a_run_directory_may_move_with_its_encoder(folder, tmp_path, monkeypatch):
    """Trained as runs/a with runs/a/t5, it is drawn from and trained on as b."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "runs/a/t5")
    config = dataclasses.replace(cascade(folder, 8), text_encoder_name="runs/a/t5")
    encoder = text.load_encoder("runs/a/t5")
    record = {"unet1": {"t5": "runs/a/t5"}}
    run_config.write("runs/a", config, record, text_encoder=encoder.identity)
    assert run_config.read("runs/a") == config
    Path("runs/a").rename("b")
    moved = run_config.read("b")
    assert moved == dataclasses.replace(config, text_encoder_name="b/t5")
    assert text.cascade_encoder(moved, recorded=run_config.read_text_encoder("b"))
    settings = command_line.recorded(storage.folder("b"), 1)
    assert settings.t5 == "b/t5" and settings.cascade().text_encoder_name == "b/t5"
    shutil.rmtree("b/t5")
    assert run_config.read("b") == config
    Path("b").rename("runs/demo")  # a run that is named like the bundled encoder is not one
    assert run_config.encoder_place("runs", "demo") == "demo"


def test_stored_embeddings_of_another_encoder_are_refused(pictures):
    """By the file beside them; without it nothing can be known."""
    config = dataclasses.replace(cascade(pictures, 8), text_encoder_name="absent")
    for i in range(2):
        np.save(pictures / f"{i}.npy", np.ones((3, WIDTH), np.float16))
    recorded = Identity(name="google/t5-v1_1-base", sha256="a" * 64)
    assert open_feed(config, pictures, recorded).text_encoder is None
    recorded.write(pictures)
    assert open_feed(config, pictures, recorded).text_encoder == recorded
    dataclasses.replace(recorded, sha256="b" * 64).write(pictures)
    with pytest.raises(ValueError, match="'google/t5-v1_1-base' .sha256 b{12}. is not") as caught:
        open_feed(config, pictures, recorded)
    assert "\n" not in str(caught.value)
    with pytest.raises(
        UserError, match="already has embeddings: --embeddings elsewhere is not used"
    ):
        open_feed(config, pictures, embeddings=Path("elsewhere"))


def test_stored_embeddings_that_are_not_finite_are_left_out(pictures):
    for i in range(2):
        np.save(pictures / f"{i}.npy", np.full((3, WIDTH), [1.0, np.nan][i], np.float32))
    feed = open_feed(cascade(pictures, 8), pictures)
    embeds, _ = conditioning(feed)
    assert (embeds[:, :3] == 1).all()
    assert "the stored embedding holds NaN" in feed.left_out["1.png"]


def test_the_file_beside_embeddings(tmp_path):
    """Found for a folder, a shard and a glob; files that differ, or cannot be read, are named."""
    a, b = (tmp_path / name for name in "ab")
    for part in (a, b):
        part.mkdir()
        (part / "0.tar").write_bytes(b"")
    one = Identity(name="t5", sha256="1" * 64)
    one.write(a)

    def found(*specs) -> Identity | None:
        return read_beside(Opening(data=tuple(map(str, specs))).folders)

    for spec in (a, a / "0.tar", tmp_path / "*" / "*.tar", f"{tmp_path}/{{a,b}}/0.tar", f"{a}=0.7"):
        assert found(spec) == one
    assert found(b, f"{a}=2") == one
    assert (
        found(b) is None and found("bundled", "https://localhost/0.tar", "memory://a/0.tar") is None
    )
    dataclasses.replace(one, sha256="2" * 64).write(b)
    with pytest.raises(ValueError, match=f"is not that of {a}/text_encoder.json"):
        found(a, b)
    for junk in ("[]", "{", '{"name": 1, "sha256": ""}', '{"name": "x"}'):
        (a / "text_encoder.json").write_text(junk)
        with pytest.raises(ValueError, match="a/text_encoder.json must be"):
            found(a)
