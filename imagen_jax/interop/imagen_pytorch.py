"""Reads and writes imagen-pytorch checkpoints.

Reads files written by `ImagenTrainer.save`, `torch.save(imagen.state_dict())`,
`Unet.persist_to_file` and `torch.save(unet.state_dict())`, of versions 1.22 to 2.1, and state dicts
of wrapped modules (`wrappers`). Writes files that 2.1.0's `load_imagen_from_checkpoint` and
`ImagenTrainer.load` accept. A trainer's file holds

    model        unets.{i}.*
    ema          {i}.initted, {i}.step, {i}.online_model.*, {i}.ema_model.*   (ema-pytorch)
    steps, version, imagen_type, imagen_params, and the optimisers, which are not converted
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from imagen_jax import nn, sharding
from imagen_jax.checkpoint import Weights, check_finite
from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.errors import UserError
from imagen_jax.imagen import Imagen
from imagen_jax.interop import configuration, infer, keys, wrappers
from imagen_jax.interop.target import replacing
from imagen_jax.interop.torch_file import read_torch_file, write_torch_file
from imagen_jax.types import Params

VERSION = "2.1.0"
STATE = re.compile(r"(optim|scaler|scheduler|warmup)\d+")
KNOWN = {"model", "ema", "steps", "version", "imagen_type", "imagen_params"}

StateDict = dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A file of imagen-pytorch: the cascade, and each U-Net's tensors under the reference's names.

    `origin` is what a run directory keeps of the file, so that it can be written again unchanged:
    version, imagen_type, imagen_params, steps, and the counters of the averages.
    """

    path: Path
    config: ImagenConfig
    online: Sequence[StateDict]
    ema: Sequence[StateDict] | None
    origin: dict[str, Any]
    notes: Sequence[str]

    @property
    def held(self) -> list[Weights]:
        """Which weights the file has."""
        return ["online"] if self.ema is None else ["ema", "online"]

    def weights(self, which: Weights) -> Sequence[StateDict]:
        """The averaged or the online tensors. Raises ValueError if the file has no average."""
        if which == "online":
            return self.online
        if self.ema is None:
            raise UserError("the file has no averaged weights (ema): use --weights online.")
        return self.ema

    def trees(self, which: Weights) -> list[Params]:
        """The weights as our parameters, which are views of the file. Raises one MisfitError for
        all U-Nets, and UserError for the first tensor with values that are not finite."""
        prefix = "unets." if which == "online" else "ema."
        trees = convert(self.config, self.weights(which), prefix)
        self.check_finite(which)
        return trees

    def check_finite(self, which: Weights) -> None:
        """Raises UserError for the first tensor with values that are not finite."""
        prefix = "unets." if which == "online" else "ema."
        for i, state in enumerate(self.weights(which)):
            for name, array in state.items():
                check_finite(array, f"{self.path}: {prefix}{i}.{name}")


def read(path: str | os.PathLike, config: str | os.PathLike | None = None) -> Checkpoint:
    """A file of imagen-pytorch; its tensors stay in the file until they are used.

    `config` is a JSON file, for a checkpoint without a configuration. Raises ValueError for a file
    that is not one of those above or that needs code to be executed, and if fields are left open.
    """
    if Path(path).suffix == ".safetensors":
        raise UserError(
            f"{path} is a safetensors file: use from-safetensors for one written by "
            "to-safetensors, and from-diffusers for the folder of a U-Net of DeepFloyd IF."
        )
    data = read_torch_file(path)
    if not isinstance(data, dict) or not data:
        raise UserError(f"{path} is not an imagen-pytorch checkpoint: it contains no dictionary.")
    data, notes = wrappers.remove(data)
    if any(STATE.fullmatch(name) for name in data):
        notes.append("the optimiser's state is not converted: training starts with a fresh one.")
    others = [name for name in data if name not in KNOWN and not STATE.fullmatch(str(name))]
    _check_entries(data, path)
    if "model" in data:
        online = _split(data["model"], "unets.", path)
        if others:
            notes.append(f"not converted: {', '.join(map(repr, others))}.")
        known = [{} for _ in online]
    elif data.keys() == {"config", "state_dict"}:
        online, known = _alone(data["state_dict"], dict(data["config"]))
        data = {}
    elif any(str(name).startswith("unets.") for name in data):
        online, data = _split(data, "unets.", path), {}
        known = [{} for _ in online]
    else:
        online, known = _alone(data, {})
        data = {}
    given = configuration.read_json(config) if config is not None else None
    ema, counters = _averages(data.get("ema"), online, path)
    steps = np.asarray(data.get("steps", np.zeros(len(online), np.int64)))
    if steps.shape != (len(online),):
        raise UserError(f"{path} holds {len(online)} U-Nets and steps of shape {steps.shape}.")
    return Checkpoint(
        path=Path(path),
        config=_configuration(data, given, online, known),
        online=online,
        ema=ema,
        origin={
            "version": data.get("version"),
            "imagen_type": data.get("imagen_type"),
            "imagen_params": data.get("imagen_params"),
            "steps": [int(step) for step in steps],
            "ema": counters,
        },
        notes=notes,
    )


def load(
    path: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    weights: Weights | None = None,
    dtype: DTypeLike = jnp.float32,
    mesh: jax.sharding.Mesh | None = None,
) -> Imagen:
    """The cascade in a file of imagen-pytorch, with parameters in float32.

    `weights` defaults to the averaged ones if there are any. On a `mesh` (DATA x MODEL, see
    `sharding`) every device gets its part of a tensor from the file; no more than that is ever in
    memory. `config` and errors: see `read`.
    """
    source = read(path, config)
    weights = weights or ("online" if source.ema is None else "ema")
    layout = sharding.single() if mesh is None else sharding.Layout(mesh)
    unets = []
    for unet, params in zip(source.config.unets, source.trees(weights), strict=True):
        if isinstance(unet, NullUnetConfig):
            unets.append(nn.NullUnet())
            continue
        unets.append(nn.bind(unet, jax.tree.map(_place, params, layout.place(params)), dtype=dtype))
    return Imagen(source.config, unets=unets, layout=None if mesh is None else layout)


def save(
    path: str | os.PathLike,
    imagen: Imagen,
    *,
    ema: Imagen | None = None,
    steps: Sequence[int] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a file for `load_imagen_from_checkpoint` and `ImagenTrainer.load`.

    `ema` is the same cascade with averaged weights. Raises ValueError if `path` exists and
    `overwrite` is not set, or if a U-Net has no weights.
    """
    params = [_params_of(unet) for unet in imagen.unets]
    averaged = None if ema is None else [_params_of(unet) for unet in ema.unets]
    with replacing(path, overwrite=overwrite) as partial:
        write(partial, imagen.config, params, averaged, {"steps": steps} if steps else {})


def write(
    path: str | os.PathLike,
    config: ImagenConfig,
    online: Sequence[Params],
    ema: Sequence[Params] | None,
    origin: Mapping[str, Any],
) -> None:
    """Writes parameters as a trainer's file; without `ema` the online ones are used for both.

    The trees in `online` and `ema` are emptied on the way, to have only one copy in memory.
    """
    kind, params = configuration.to_theirs(config)
    if _describes(origin, config):
        kind, params = origin["imagen_type"], origin["imagen_params"]
    steps = origin.get("steps") or [0] * len(config.unets)
    counters = origin.get("ema") or [dict(initted=True, step=step) for step in steps]
    model, averages = {}, {}
    for i, tree in enumerate(online):
        state = _take(tree)
        mean = state if ema is None else _take(ema[i])
        model |= {f"unets.{i}.{name}": array for name, array in state.items()}
        averages[f"{i}.initted"] = _flag(counters[i]["initted"])
        averages[f"{i}.step"] = np.asarray(counters[i]["step"], np.int64)
        averages |= {f"{i}.online_model.{name}": array for name, array in state.items()}
        averages |= {f"{i}.ema_model.{name}": array for name, array in mean.items()}
    content = dict(
        model=model,
        version=origin.get("version") or VERSION,
        steps=np.asarray(steps, np.int64),
        ema=averages,
        imagen_type=kind,
        imagen_params=params,
    )
    write_torch_file(path, content)


def _describes(origin: Mapping[str, Any], config: ImagenConfig) -> bool:
    """Whether a run still has the configuration of the file that it came from."""
    kind, params = origin.get("imagen_type"), origin.get("imagen_params")
    if params is None or not configuration.is_complete(params):
        return False
    norms = [getattr(unet, "norm", "rms") for unet in config.unets]
    return configuration.to_ours(params, kind or "original", norms) == config


def convert(config: ImagenConfig, states: Sequence[StateDict], prefix: str) -> list[Params]:
    """Each U-Net's tensors as parameters. Raises MisfitError with the problems of all U-Nets."""
    trees, problems, count = [], [], 0
    for i, (unet, state) in enumerate(zip(config.unets, states, strict=True)):
        try:
            trees.append(keys.to_jax(state, keys.target(unet), prefix=f"{prefix}{i}."))
        except keys.MisfitError as error:
            problems += error.problems
        count += len(state)
    if problems:
        raise keys.MisfitError(problems, count)
    return trees


def _check_entries(data: Mapping[str, Any], path: Any) -> None:
    """Raises ValueError for entries beside the tensors that have the wrong type."""
    kind, params = data.get("imagen_type"), data.get("imagen_params")
    if kind not in (None, "original", "elucidated"):
        raise UserError(f"{path}: imagen_type {kind!r} is neither 'original' nor 'elucidated'.")
    for name, value in (("imagen_params", params), ("config", data.get("config"))):
        if value is not None and not isinstance(value, dict):
            raise UserError(f"{path}: {name} is {type(value).__name__}, not a dictionary.")


def _configuration(
    data: Mapping[str, Any],
    given: Mapping[str, Any] | None,
    online: Sequence[StateDict],
    known: Sequence[Mapping[str, Any]],
) -> ImagenConfig:
    """The configuration in the file or the JSON, or one inferred from the tensors and the JSON."""
    kind: Literal["original", "elucidated"] = data.get("imagen_type") or "original"
    params = data.get("imagen_params")
    if given is not None:
        kind, params = given["type"] or kind, given["imagen"]
    shapes = [{name: np.shape(a) for name, a in state.items()} for state in online]
    if params is not None and configuration.is_complete(params):
        norms = [infer.norm(tensors) for tensors in shapes]
        return configuration.to_ours(params, kind, norms, known)
    return configuration.cascade(configuration.complete(shapes, known, params or {}), kind)


def _split(state: Any, prefix: str, path: Any) -> list[StateDict]:
    """The tensors of each U-Net, from names such as `unets.{i}.*`."""
    parts: dict[int, StateDict] = {}
    for name, array in _tensors(state, path).items():
        match = re.fullmatch(re.escape(prefix) + r"(\d+)\.(.+)", name)
        if not match:
            raise UserError(
                f"{path}: the tensor {name} does not belong to any U-Net ({prefix}0. ...)."
            )
        parts.setdefault(int(match[1]), {})[match[2]] = array
    if sorted(parts) != list(range(len(parts))):
        raise UserError(f"{path} holds U-Nets {sorted(parts)}: some are missing.")
    return [parts[i] for i in range(len(parts))]


def _alone(state: Any, config: dict[str, Any]) -> tuple[list[StateDict], list[dict[str, Any]]]:
    """One U-Net as a cascade: a super-resolution U-Net follows a `NullUnet`."""
    state = _tensors(state, "the file")
    if "to_lowres_time_cond.0.weight" not in state:
        return [state], [config]
    return [{"dummy_parameter": np.zeros(1, np.float32)}, state], [{}, config]


def _averages(
    state: Any, online: Sequence[StateDict], path: Any
) -> tuple[list[StateDict] | None, list[dict[str, Any]] | None]:
    """Each U-Net's tensors of `ema_model`, and ema-pytorch's counters."""
    if state is None:
        return None, None
    parts = _split(state, "", path)
    if len(parts) != len(online):
        raise UserError(f"{path} holds {len(online)} U-Nets and averages of {len(parts)}.")
    averages, counters = [], []
    for i, (tensors, mine) in enumerate(zip(parts, online, strict=True)):
        counters.append({name: tensors.pop(name).tolist() for name in ("initted", "step")})
        copies = _under(tensors, "online_model.")
        if copies:
            _check_copies(i, copies, mine, path)
        averages.append(_under(tensors, "ema_model."))
        if tensors:
            raise UserError(f"{path}: ema.{i}.{next(iter(tensors))} is unknown.")
    return averages, counters


def _check_copies(index: int, copies: StateDict, online: StateDict, path: Any) -> None:
    """A trainer's file has the online weights twice, the second time under `ema`: checks that."""
    for name in copies.keys() | online.keys():
        a, b = copies.get(name), online.get(name)
        if a is None or b is None or not same_bits(a, b):
            raise UserError(
                f"{path}: ema.{index}.online_model.{name} differs from model's unets.{index}.{name}"
            )


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    """Whether two arrays have the same bits, including NaNs and signs of zeros."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.ctypes.data == b.ctypes.data and a.strides == b.strides:
        return True
    a, b = (np.ascontiguousarray(x).reshape(-1).view(np.uint8) for x in (a, b))
    return np.array_equal(a, b)


def _flag(value: bool | list[float]) -> np.ndarray:
    """ema-pytorch's `initted`: a boolean today, an array of one float32 in old files."""
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == np.float64 else array


def _under(tensors: StateDict, prefix: str) -> StateDict:
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors.pop(name) for name in names}


def _tensors(state: Any, path: Any) -> StateDict:
    if not isinstance(state, dict):
        raise UserError(f"{path}: a dictionary of tensors was expected, found {type(state)}.")
    for name, array in state.items():
        if not isinstance(name, str) or not isinstance(array, np.ndarray):
            raise UserError(f"{path}: {name!r} is not a tensor; this is not a state dict.")
    return dict(state)


def _place(array: np.ndarray, where: jax.sharding.Sharding) -> jax.Array:
    """A float32 array; each device reads its own part."""
    return jax.make_array_from_callback(
        array.shape, where, lambda index: np.asarray(array[index], np.float32)
    )


def _params_of(unet: nnx.Module) -> Params:
    return nnx.to_pure_dict(nnx.split(unet)[1])


def _take(tree: Params) -> StateDict:
    """The state dict of parameters; each array is freed once its copy in torch's layout is made."""
    state = keys.to_torch(tree)
    tree.clear()
    return {name: np.ascontiguousarray(state.pop(name)) for name in list(state)}
