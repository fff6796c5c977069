"""What is done to an image before it is written, on request: a safety checker, a signature.

    --safety-checker MODEL.onnx    images that a classifier finds unsafe are written as plain grey
    --c2pa CERT KEY                files are signed, and state that a model made them

docs/hooks.md describes suitable classifiers and certificates. Each hook needs an extra of the
package.
"""

import dataclasses
import importlib
import io
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image

from imagen_jax.errors import UserError, first_line
from imagen_jax.pixels import to_pil
from sample import outputs
from sample.settings import Settings

Pixels = Float[np.ndarray, "h w c"] | UInt8[np.ndarray, "h w c"]

BGR_MEAN = (104.0, 117.0, 123.0)
"""Mean of Open NSFW's training set (github.com/yahoo/open_nsfw, classify_nsfw.py), in 0 .. 255."""
RESIZED = 256 / 224
"""Images are resized to this multiple of the classifier's input size, then centre-cropped."""

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/"
MADE, ALTERED = "trainedAlgorithmicMedia", "compositeWithTrainedAlgorithmicMedia"
FROM_AN_IMAGE = ("upscale", "inpaint", "image_to_image")
"""Commands whose images contain or continue one that the user gave."""


@dataclasses.dataclass(kw_only=True)
class Hooks:
    """The hooks of a command, and how many images they have seen."""

    unsafe: Callable[[Pixels], bool] | None = None
    signer: "Signer | None" = None
    checked: int = 0
    flagged: int = 0

    @classmethod
    def open(cls, given: Settings) -> "Hooks":
        """Raises UserError for a missing extra, and for a classifier, certificate or key that
        cannot be used, so that no image is drawn in vain."""
        unsafe = signer = None
        if given.safety_checker is not None:
            unsafe = open_checker(given.safety_checker, given.safety_threshold)
        if given.c2pa is not None:
            signer = Signer(*given.c2pa)
        return cls(unsafe=unsafe, signer=signer)

    def flags(self, image: Pixels) -> bool:
        """Whether an image must not be shown."""
        if self.unsafe is None:
            return False
        flagged = self.unsafe(image)
        self.checked, self.flagged = self.checked + 1, self.flagged + flagged
        return flagged

    def report(self) -> str | None:
        """One line about the images since the last report; None without a checker."""
        if self.unsafe is None:
            return None
        line = f"safety checker: {self.flagged} of {self.checked} images flagged"
        line += " and blanked." if self.flagged else "."
        self.checked = self.flagged = 0
        return line


def blank(image: Pixels) -> Float[np.ndarray, "h w c"]:
    """A plain grey image of the same size, opaque."""
    grey = np.full(image.shape, 0.5, np.float32)
    grey[..., 3:] = 1
    return grey


# ---- the safety checker


def open_checker(path: Path, threshold: float) -> Callable[[Pixels], bool]:
    """`unsafe(image)` by a classifier in ONNX with the same preprocessing as Open NSFW.

    Its input is (n, size, size, 3), its output (n, classes) probabilities, of which the last is
    that of unsafe images, from `threshold` on. Raises UserError for another model.
    """
    onnxruntime = _extra("onnxruntime", "safety", "--safety-checker")
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only: it warns about unknown machines
    try:
        session = onnxruntime.InferenceSession(
            path.read_bytes(), options, providers=["CPUExecutionProvider"]
        )
    except OSError as error:
        raise UserError(f"--safety-checker {path}: {error.strerror}.") from error
    except Exception as error:  # its exceptions have no common class of their own
        raise UserError(
            f"--safety-checker {path} is not a model that onnxruntime can read: {first_line(error)}"
        ) from error
    size = _input_size(path, session)

    def probability(image: Pixels) -> float:
        batch = {session.get_inputs()[0].name: preprocess(image, size)[None]}
        return float(session.run(None, batch)[0][0, -1])

    probability(np.zeros((8, 8, 3), np.float32))
    return lambda image: not probability(image) < threshold  # a score of NaN is unsafe


def preprocess(image: Pixels, size: int) -> Float[np.ndarray, "size size 3"]:
    """An image as Open NSFW was trained on: BGR in 0 .. 255, minus the mean.

    It is squashed to a square and goes through a JPEG file, as the training images did.
    """
    file, resized = io.BytesIO(), round(size * RESIZED)
    picture = to_pil(image).convert("RGB")
    picture.resize((resized, resized), Image.Resampling.BILINEAR).save(file, "jpeg")
    with Image.open(file) as picture:
        pixels = np.asarray(picture.convert("RGB"), np.float32)
    first = (resized - size) // 2
    return pixels[first:, first:][:size, :size, ::-1] - np.asarray(BGR_MEAN, np.float32)


def _input_size(path: Path, session: Any) -> int:
    inputs, outputs_ = session.get_inputs(), session.get_outputs()
    shape = inputs[0].shape if len(inputs) == 1 else []
    scores = outputs_[0].shape
    square = len(shape) == 4 and isinstance(shape[1], int) and shape[1] == shape[2]
    if not square or shape[3] != 3 or len(scores) != 2 or scores[1] == 1:
        found = " and ".join(str(one.shape) for one in inputs)
        raise UserError(
            f"--safety-checker {path} takes {found} and returns {scores}; it must take images as "
            "(n, size, size, 3) and return probabilities as (n, classes), the last for unsafe."
        )
    return shape[1]


# ---- the signature


class Signer:
    """Signs image files with a certificate, by the C2PA standard (spec.c2pa.org).

    `certificate` is a PEM file with the chain, starting with the signer's own; `key` one with its
    private key, without a password. Raises UserError if they do not match.
    """

    def __init__(self, certificate: Path, key: Path):
        self._c2pa = _extra("c2pa", "c2pa", "--c2pa")
        self._name = f"--c2pa {certificate} {key}"
        try:
            self._chain, pem = certificate.read_bytes(), key.read_bytes()
        except OSError as error:
            raise UserError(f"--c2pa {error.filename}: {error.strerror}.") from error
        self._algorithm, self._key = _private_key(key, pem)
        file = io.BytesIO()
        Image.new("RGB", (8, 8)).save(file, "png")
        self.sign(file.getvalue(), "png", command="")

    def sign(self, data: bytes, format: outputs.Format, *, command: str) -> bytes:
        """The bytes of an image file with a signed manifest that says what made it.

        There is no timestamp from a server: a signature is valid as long as its certificate.
        """
        c2pa, signed = self._c2pa, io.BytesIO()
        no_thumbnail = {"builder": {"thumbnail": {"enabled": False}}}
        try:
            information = c2pa.C2paSignerInfo(self._algorithm, self._chain, self._key, None)
            with (
                c2pa.Context(c2pa.Settings.from_dict(no_thumbnail)) as context,
                c2pa.Signer.from_info(information) as signer,
                c2pa.Builder(manifest(command), context) as builder,
            ):
                builder.sign(signer, f"image/{format}", io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            raise UserError(f"{self._name}: cannot sign: {first_line(error)}") from error
        return signed.getvalue()


def manifest(command: str) -> dict[str, Any]:
    """The C2PA manifest of an image: the software, and that a trained model made or altered it."""
    software = {"name": "imagen-jax", "version": outputs.version()}
    source = SOURCE_TYPE + (ALTERED if command in FROM_AN_IMAGE else MADE)
    created = {"action": "c2pa.created", "digitalSourceType": source, "softwareAgent": software}
    return {
        "claim_generator_info": [software],
        "assertions": [{"label": "c2pa.actions", "data": {"actions": [created]}}],
    }


def _private_key(path: Path, pem: bytes) -> tuple[str, bytes]:
    """A private key's algorithm, by its name in C2PA, and the key in PKCS #8."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"--c2pa: {path} is not an unencrypted private key in PEM: {first_line(error)}"
        ) from error
    match key:
        case ec.EllipticCurvePrivateKey(key_size=(256 | 384 | 521) as bits):
            algorithm = f"es{min(bits, 512)}"
        case ed25519.Ed25519PrivateKey():
            algorithm = "ed25519"
        case rsa.RSAPrivateKey():
            algorithm = "ps256"
        case _:
            raise UserError(f"--c2pa: {path}: C2PA does not support this kind of key.")
    return algorithm, key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _extra(module: str, extra: str, flag: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{flag} needs the package {module}: pip install -e '.[{extra}]'"
        ) from error
