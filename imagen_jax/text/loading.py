"""Loads a Hugging Face T5, from a folder or by its hub name, as the parameters of our encoder.

`_TABLE` maps the names. Tensors are read one at a time, cast on the host and put on the device, so
that peak memory is the model in its final dtype plus one tensor. All mismatches are gathered and
raised once.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import traverse_util
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from imagen_jax.errors import UserError, first_line
from imagen_jax.interop.torch_file import read_torch_file
from imagen_jax.sharding import Layout
from imagen_jax.text import identity
from imagen_jax.text.t5 import T5Config, abstract_encoder
from imagen_jax.types import Params

# Name in the checkpoint, path in our parameters, and whether the matrix is transposed (torch stores
# (out, in)); {0} is the number of a block, {1} one of the words listed. A path is written under the
# name in its first row: a full T5 calls its embedding table `shared`, some encoders `embed_tokens`.
_BLOCK = "encoder.block.{0}.layer."
_TABLE: tuple[tuple[str, str, bool, str], ...] = (
    ("shared.weight", "embedding", False, ""),
    ("encoder.embed_tokens.weight", "embedding", False, ""),
    (
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "position_bias",
        False,
        "",
    ),
    (_BLOCK + "0.layer_norm.weight", "blocks/{0}/attention_norm/scale", False, ""),
    (_BLOCK + "0.SelfAttention.{1}.weight", "blocks/{0}/attention/{1}/kernel", True, "q|k|v|o"),
    (_BLOCK + "1.layer_norm.weight", "blocks/{0}/feed_forward_norm/scale", False, ""),
    (
        _BLOCK + "1.DenseReluDense.{1}.weight",
        "blocks/{0}/feed_forward/{1}/kernel",
        True,
        "wi|wi_0|wi_1|wo",
    ),
    ("encoder.final_layer_norm.weight", "norm/scale", False, ""),
)
_IGNORED = r"decoder\..*|lm_head\..*"  # the other half of a full T5

_WEIGHTS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)


def find_folder(name_or_folder: str | Path) -> Path:
    """A folder as it is; a name such as `google/t5-v1_1-base` through the hub's local cache.

    Downloads what the encoder needs if the cache lacks it. Raises ValueError with one line if the
    name is neither, or the hub cannot be reached.
    """
    folder = Path(name_or_folder).expanduser()
    if folder.is_dir():
        return folder
    name = str(name_or_folder)
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", name):
        raise UserError(f"text encoder {name!r}: no such folder.")

    from huggingface_hub import snapshot_download

    try:
        cached = _cached(name)
        if cached is not None:
            return cached
        # One format only: the repositories hold the same weights several times over.
        for weights in ("model*.safetensors", "pytorch_model*.bin"):
            patterns = ["*.json", "spiece.model", weights]
            folder = Path(snapshot_download(name, allow_patterns=patterns))
            if weight_files(folder):
                return folder
    except (OSError, ValueError) as error:
        raise UserError(
            f"text encoder {name!r} is not a folder here, is not in the Hugging Face cache and "
            f"could not be downloaded: {first_line(error)}"
        ) from error
    raise UserError(f"text encoder {name!r} has neither safetensors nor .bin weights on the hub.")


def _cached(name: str) -> Path | None:
    """The hub's local snapshot, if all that the encoder needs is in it."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    try:
        complete = (folder / "config.json").is_file() and weight_files(folder)
    except ValueError:  # an index whose shards were not all fetched
        return None
    return folder if complete else None


def read_config(folder: Path) -> T5Config:
    """Raises ValueError that names the file."""
    path = folder / "config.json"
    try:
        return T5Config.from_dict(_read_json(path))
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error


def load_params(
    folder: Path,
    config: T5Config,
    *,
    dtype: DTypeLike = jnp.float32,
    layout: Layout | None = None,
) -> tuple[Params, str]:
    """The encoder's weights in `dtype`, matched strictly by name, placed by `layout`; their hash.

    Raises UserError with all missing, unknown and misshapen names, and those of tensors that hold
    NaN or infinity.
    """
    files = weight_files(folder)
    if not files:
        raise UserError(
            f"{folder} has no T5 weights: neither {' nor '.join(one for one, _ in _WEIGHTS)} "
            "nor an index of shards."
        )
    shapes = traverse_util.flatten_dict(abstract_encoder(config)[1])
    paths = {"/".join(map(str, path)): path for path in shapes}
    loaded: dict[tuple[Any, ...], Any] = {}
    digests: dict[tuple[Any, ...], bytes | None] = {}
    unknown, misshapen, infinite = [], [], []
    for file in files:
        for name, read in _tensors(file):
            if re.fullmatch(_IGNORED, name):
                continue
            target, transpose = _translate(name)
            if target not in paths:
                unknown.append(name)
                continue
            path = paths[target]
            if path in loaded:
                continue  # the embedding table under its second name
            tensor = read()
            tensor = tensor.T if transpose else tensor
            if tensor.shape != shapes[path].shape:
                misshapen.append(f"{name} (is {tensor.shape}, must be {shapes[path].shape})")
                loaded[path] = None
                continue
            kept = np.array(tensor, dtype=stored_dtype(path, dtype), order="C")
            digests[path] = identity.digest(tensor if kept.dtype == np.float16 else kept)
            if digests[path] is None:
                infinite.append(name)
            loaded[path] = jnp.asarray(kept) if layout is None else layout.put(path, kept)
    missing = [name for name, path in paths.items() if path not in loaded]
    _refuse(folder, missing, unknown, misshapen, infinite)
    params = traverse_util.unflatten_dict({path: loaded[path] for path in shapes})
    return params, identity.weights_hash(digests)


def _refuse(
    folder: Path,
    missing: list[str],
    unknown: list[str],
    misshapen: list[str],
    infinite: list[str],
) -> None:
    labels = dict(missing=missing, unknown=unknown, misshapen=misshapen)
    problems = [f"{label} {len(names)}: {_few(names)}" for label, names in labels.items() if names]
    if problems:
        raise UserError(f"{folder} does not fit its config.json. {'; '.join(problems)}.")
    if infinite:
        raise UserError(f"{folder} is damaged: NaN or infinity in {_few(infinite)}.")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def stored_dtype(path: tuple[Any, ...], dtype: DTypeLike) -> DTypeLike:
    """The dtype of the parameter at `path` in an encoder of `dtype`.

    Norm scales and the position bias stay float32 (they are used in float32 and are tiny); so does
    `wo` in float16, see `FeedForward`.
    """
    wide = path[-1] in ("scale", "position_bias") or (dtype == jnp.float16 and "wo" in path)
    return jnp.float32 if wide else dtype


def weight_files(folder: Path) -> list[Path]:
    """The files that hold the weights, safetensors before `.bin`; none if there are none.

    Raises ValueError if an index names a shard that is not there.
    """
    for single, index in _WEIGHTS:
        if (folder / single).is_file():
            return [folder / single]
        if (folder / index).is_file():
            try:
                shards = sorted(set(_read_json(folder / index)["weight_map"].values()))
            except (KeyError, AttributeError) as error:
                raise UserError(f"{folder / index} has no weight_map.") from error
            absent = [shard for shard in shards if not (folder / shard).is_file()]
            if absent:
                raise UserError(f"{folder / index} names files that are missing: {absent}.")
            return [folder / shard for shard in shards]
    return []


def tensors(folder: Path) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """The tensors of all weight files of a Hugging Face folder, in the form of `_tensors`."""
    for file in weight_files(folder):
        yield from _tensors(file)


def _tensors(file: Path) -> Iterator[tuple[str, Callable[[], np.ndarray]]]:
    """Yields names and functions that read the tensors, so that unwanted ones are never read."""
    if file.suffix != ".safetensors":
        state = read_torch_file(file)
        if not isinstance(state, dict):
            raise UserError(f"{file} holds a {type(state).__name__}, not named tensors.")
        for name, tensor in state.items():
            yield name, lambda tensor=tensor: tensor
        return
    try:
        with safe_open(file, "np") as tensors:
            for name in tensors.keys():
                yield name, lambda name=name: tensors.get_tensor(name)
    except SafetensorError as error:
        raise UserError(f"{file} is not a readable safetensors file: {error}") from error


def _translate(name: str, *, back: bool = False) -> tuple[str | None, bool]:
    """Our path for a name in the checkpoint, or `back` the name for a path; and whether the matrix
    is transposed."""
    for row in _TABLE:
        source, target = (row[1], row[0]) if back else row[:2]
        pattern = re.escape(source).replace(r"\{0\}", r"(\d+)").replace(r"\{1\}", f"({row[3]})")
        match = re.fullmatch(pattern, name)
        if match:
            return target.format(*match.groups()), row[2]
    return None, False


def save_params(folder: Path, config: T5Config, params: Params) -> None:
    """Writes `config.json` and `model.safetensors` as transformers' `T5EncoderModel` has them, in
    float32: what `load_params` reads."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for path, value in traverse_util.flatten_dict(params).items():
        name, transpose = _translate("/".join(map(str, path)), back=True)
        value = np.asarray(value, np.float32)
        tensors[name] = np.ascontiguousarray(value.T if transpose else value)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = dataclasses.asdict(config)
    about = {"model_type": "t5", "architectures": ["T5EncoderModel"], "is_encoder_decoder": False}
    (folder / "config.json").write_text(json.dumps(about | fields, indent=1) + "\n")


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist.") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from error
