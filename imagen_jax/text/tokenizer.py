"""Captions to token ids, with the 32,100 pieces of T5's vocabulary.

The vocabulary is shipped (`assets/`), so that the first image needs no download. The
`tokenizers` library reads it in milliseconds, where importing all of transformers takes seconds.
"""

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int32
from tokenizers import Tokenizer

from imagen_jax.errors import UserError, first_line
from imagen_jax.types import AnyArray
from imagen_jax.unet_config import TEXT_LENGTH

END = 1  # the id of T5's end token
SHORTEST = 32
"""The fewest columns of tokens that `trim` leaves."""

_BUNDLED = Path(__file__).parent / "assets" / "tokenizer.json"
_T5_SPIECE_SHA256 = "d60acb128cf7b7f2536e8f38a5b18a05535c9e14c7a355904270e15b0945ea86"


def load_tokenizer(folder: str | Path | None = None) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; the bundled one if it has none, or without a folder.

    Google's v1.1 folders hold only `spiece.model`. T5's own is recognised by its checksum and needs
    nothing else; any other is converted by transformers, which needs sentencepiece and protobuf.
    """
    path, spiece = _BUNDLED, None
    if folder is not None:
        own = Path(folder) / "tokenizer.json"
        spiece = Path(folder) / "spiece.model"
        if own.is_file():
            path = own
        elif spiece.is_file() and _sha256(spiece) != _T5_SPIECE_SHA256:
            return _convert(spiece)
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise UserError(f"{path} is not a readable tokenizer: {error}") from error
    return _plain(tokenizer)


def tokenize(
    tokenizer: Tokenizer,
    texts: Sequence[str],
    *,
    max_length: int = TEXT_LENGTH,
    blank: bool = False,
) -> Int32[np.ndarray, "b {max_length}"]:
    """Token ids, padded with 0; a longer caption is cut and still ends with the end token.

    Raises UserError for a caption without text, naming its number from 1, unless `blank` allows it:
    it is then only the end token.
    """
    if isinstance(texts, str):
        raise UserError(f"texts must be a list of captions, not one string: {texts[:40]!r}.")
    if max_length < 1:
        raise UserError(f"max_length = {max_length} must be positive.")
    tokens = np.zeros((len(texts), max_length), np.int32)
    for i, text in enumerate(texts):
        if not isinstance(text, str) or not (blank or text.strip()):
            raise UserError(f"caption {i + 1} of {len(texts)} is empty: {text!r}.")
        # One by one: the library's own batching starts threads, which do not survive a fork.
        ids = tokenizer.encode(valid(text)).ids
        if len(ids) > max_length:
            ids = ids[: max_length - 1] + ids[-1:]
        tokens[i, : len(ids)] = ids
    return tokens


def trim(tokens: Int32[np.ndarray, "b l"]) -> Int32[np.ndarray, "b l2"]:
    """Removes most of the columns in which every row is padding.

    32, 64, 128 or 256 columns are left, so that an encoder is compiled for few shapes. Padding is
    masked: up to rounding, the embeddings of the real tokens are the same as with all columns.
    """
    return tokens[:, : columns(tokens != 0)]


def columns(mask: Bool[np.ndarray, "b l"]) -> int:
    """How many columns `trim` leaves of tokens with this mask."""
    longest = int(max(np.flatnonzero(mask.any(axis=0)), default=0)) + 1
    return max(SHORTEST, 1 << (longest - 1).bit_length())


def fitted(tokens: Int32[AnyArray, "b l"], length: int) -> Int32[Array, "b l2"]:
    """Tokens cut to `length`, still with the end token, or padded with 0."""
    cut = jnp.pad(jnp.asarray(tokens), ((0, 0), (0, max(0, length - tokens.shape[1]))))[:, :length]
    return cut.at[:, -1].set(jnp.where(cut[:, -1] == 0, 0, END))


def valid(text: str) -> str:
    """Replaces lone surrogates, from JSON or arguments that are not UTF-8, with U+FFFD."""
    return re.sub("[\ud800-\udfff]", "\N{REPLACEMENT CHARACTER}", text)


def _convert(spiece: Path) -> Tokenizer:
    try:
        from transformers import AutoTokenizer

        return _plain(AutoTokenizer.from_pretrained(spiece.parent).backend_tokenizer)
    except (ImportError, ValueError, OSError) as error:
        raise UserError(
            f"{spiece} could not be converted; `pip install -e '.[sentencepiece]'` may help, or "
            f"put a tokenizer.json beside it. ({first_line(error)})"
        ) from error


def _plain(tokenizer: Tokenizer) -> Tokenizer:
    """Turns off the padding and truncation that a file may define: ours are used."""
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
