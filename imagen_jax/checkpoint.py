"""A run directory: the configuration, and the parameters of each U-Net, through Orbax.

    RUN/config.json          {"imagen": ImagenConfig, "training": {"unet1": ..., ...}}, "origin"
                             where the weights were converted (interop.imagen_pytorch), and
                             "text_encoder", the name and hash of the one it was trained with
    RUN/unet1/STEP/params    online parameters
    RUN/unet1/STEP/ema       their running average, where training keeps one
    RUN/unet1/STEP/opt_state, meta    what `--resume` needs besides
    RUN/metrics.jsonl, RUN/samples/   written by training

Orbax writes a step to a temporary name and renames it when it is whole, so that whatever a crash
or a full disk leaves behind, the newest whole step is found. A power cut can leave the new name
with files that never reached the disk: an empty file marks a torn step, which is passed over.
`--resume` also passes over steps that cannot be read (`Damaged`).
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx
from jax.typing import DTypeLike

from imagen_jax import nn
from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.errors import UserError
from imagen_jax.fields import first_difference
from imagen_jax.imagen import Imagen
from imagen_jax.sharding import Layout, make_layout
from imagen_jax.text import Identity
from imagen_jax.types import Params

Weights = Literal["ema", "online"]


class Damaged(UserError):
    """A step is there, and cannot be read."""


def stage_path(run: str | os.PathLike, unet_number: int) -> Path:
    return Path(run).absolute() / f"unet{unet_number}"


def read_config(run: str | os.PathLike) -> ImagenConfig:
    """The cascade of a run directory. Raises ValueError if there is none."""
    return ImagenConfig.from_dict(_read_json(run)["imagen"])


def read_origin(run: str | os.PathLike) -> dict[str, Any] | None:
    """What converted weights remember of the file they came from."""
    return _read_json(run).get("origin")


def read_text_encoder(run: str | os.PathLike) -> Identity | None:
    """The text encoder that a run was trained with; None without a record, or without a run."""
    if not (Path(run) / "config.json").exists():
        return None
    found = _read_json(run).get("text_encoder")
    return None if found is None else Identity.from_dict(found)


def write_config(
    run: str | os.PathLike,
    config: ImagenConfig,
    training: Mapping[str, Any] | None = None,
    *,
    origin: Mapping[str, Any] | None = None,
    text_encoder: Identity | None = None,
) -> None:
    """Writes `config.json`, adding `training` (`{"unet1": settings}`) to what stands there.

    A run directory holds one cascade. Raises ValueError, and writes nothing, if it holds another.
    """
    path = Path(run) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):
        check_config(run, config)
        data = _read_json(run) if path.exists() else {}
        data["imagen"] = config.to_dict()
        data["training"] = data.get("training", {}) | dict(training or {})
        if origin is not None:
            data["origin"] = dict(origin)
        if text_encoder is not None:
            text_encoder.check(read_text_encoder(run), str(run))
            data["text_encoder"] = text_encoder.to_dict()
        partial = path.with_suffix(".partial")
        with partial.open("w") as file:
            file.write(json.dumps(data, indent=2) + "\n")
            file.flush()
            os.fsync(file.fileno())  # or a power cut may leave the new name with nothing in it
        partial.replace(path)


@contextlib.contextmanager
def _alone(run: Path) -> Iterator[None]:
    """One process at a time, where the file system has locks: stages of a cascade may be trained
    side by side in one directory."""
    with (run / ".lock").open("a") as file:
        with contextlib.suppress(OSError):  # it has none
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def check_config(run: str | os.PathLike, config: ImagenConfig) -> None:
    """Raises ValueError if the run directory holds another cascade; it need not exist."""
    path = Path(run) / "config.json"
    difference = first_difference(read_config(run), config) if path.exists() else None
    if difference:
        raise UserError(f"{path} describes another cascade: {difference}.")


def open_manager(
    run: str | os.PathLike, unet_number: int, *, keep: int | None = None
) -> ocp.CheckpointManager:
    """Orbax's manager of one U-Net's steps, for the one process that writes them.

    Close it, or use it as a context: both wait for the writing to end. Opening it clears away what
    an interrupted save left behind, so readers use `latest_step` and `restore` instead.
    """
    options = ocp.CheckpointManagerOptions(max_to_keep=keep, create=True)
    return ocp.CheckpointManager(stage_path(run, unet_number), options=options)


def save_step(
    manager: ocp.CheckpointManager, step: int, trees: Mapping[str, Any], meta: Mapping[str, Any]
) -> None:
    """Begins to write one step; returns when the arrays are copied, not when they are on disk.

    Raises ValueError, and writes nothing, if the manager holds this step or a later one.
    """
    items = {name: ocp.args.StandardSave(tree) for name, tree in trees.items()}
    args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(dict(meta)))
    if manager.latest_step() is not None and manager.latest_step() >= step:
        raise UserError(
            f"{manager.directory} is at step {manager.latest_step()}: step {step} cannot be added."
        )
    manager.save(step, args=args)


def steps(run: str | os.PathLike, unet_number: int) -> list[int]:
    """The steps of a U-Net in a run, the newest first, torn ones among them."""
    path = stage_path(run, unet_number)
    return sorted(ocp.utils.checkpoint_steps(path), reverse=True) if path.is_dir() else []


def latest_step(run: str | os.PathLike, unet_number: int) -> int | None:
    """The newest whole step of a U-Net in a run, None if there is none."""
    path = stage_path(run, unet_number)
    whole = (step for step in steps(run, unet_number) if not _torn(path / str(step)))
    return next(whole, None)


def set_aside(run: str | os.PathLike, unet_number: int, step: int) -> Path:
    """Renames a step that cannot be read, so that its number is free."""
    path = stage_path(run, unet_number) / str(step)
    aside = path.with_name(f"{step}.damaged")
    shutil.rmtree(aside, ignore_errors=True)
    return path.rename(aside)


def restore(run: str | os.PathLike, unet_number: int, step: int, item: str, target: Any) -> Any:
    """One tree of a step, placed as the `ShapeDtypeStruct`s of `target` say.

    Raises `Damaged` if the step has no such tree, one of other shapes, or one that cannot be read.
    """
    path = stage_path(run, unet_number) / str(step) / item
    if not path.is_dir():
        raise Damaged(f"{path.parents[1]} holds no {item} of step {step}.")
    with ocp.StandardCheckpointer() as checkpointer:
        try:
            return checkpointer.restore(path, target)
        except (ValueError, KeyError, OSError) as error:
            raise Damaged(
                f"{path} is damaged, or of another architecture: {_first_line(error)}"
            ) from error


def read_meta(run: str | os.PathLike, unet_number: int, step: int) -> dict[str, Any]:
    """What training wrote beside the arrays of a step. Raises `Damaged`."""
    path = stage_path(run, unet_number) / str(step) / "meta"
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(path)
        except (ValueError, OSError) as error:
            raise Damaged(f"{path} is damaged: {_first_line(error)}") from error


def load_params(
    run: str | os.PathLike,
    unet_number: int,
    *,
    weights: Weights = "ema",
    step: int | None = None,
    layout: Layout | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Params | None:
    """One U-Net's parameters, the newest or those of `step`; None if it has none.

    `dtype` other than float32 is that of a network which is not trained (`nn.stored_dtypes`).

    They go where `layout` says, by default to one device. `ema` means the online parameters where
    no average was kept (`imagen_jax.save`).
    """
    config = read_config(run).unets[unet_number - 1]
    step = latest_step(run, unet_number) if step is None else step
    if step is None or isinstance(config, NullUnetConfig):
        return None
    has_ema = (stage_path(run, unet_number) / str(step) / "ema").is_dir()
    item = "ema" if weights == "ema" and has_ema else "params"
    shapes = nn.stored_shapes(nn.abstract(config)[1], dtype)
    target = placed(shapes) if layout is None else layout.targets(shapes)
    return restore(run, unet_number, step, item, target)


def placed(tree: Any) -> Any:
    """The shapes of a tree as a restore target on the default device."""
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def load(
    run: str | os.PathLike,
    *,
    weights: Weights = "ema",
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: str | Layout | None = None,
    unet_numbers: Sequence[int] | None = None,
) -> Imagen:
    """The cascade of a run directory, with the newest weights of its U-Nets.

    The networks compute in `dtype`. Parameters are read in `param_dtype`: float32 to train them,
    `dtype` to sample alone, with the same results. `mesh`, as "8x1" or "auto", distributes them
    over devices, each of which reads its part.
    `unet_numbers` chooses which to load. A U-Net that is not loaded, or was never trained, is a
    `NullUnet`, which `Imagen.sample` refuses. Raises ValueError if `run` holds no cascade.
    """
    config = read_config(run)
    layout = make_layout(mesh) if isinstance(mesh, str) else mesh
    read = dict(weights=weights, layout=layout, dtype=param_dtype)
    unets = []
    for number, unet in enumerate(config.unets, 1):
        wanted = unet_numbers is None or number in unet_numbers
        params = load_params(run, number, **read) if wanted else None
        unets.append(nn.NullUnet() if params is None else nn.bind(unet, params, dtype=dtype))
    return Imagen(config, unets=unets, layout=layout, text_encoder=read_text_encoder(run))


def save(run: str | os.PathLike, imagen: Imagen, *, step: int = 0) -> None:
    """Writes configuration and parameters; `load` gives them back.

    Raises ValueError if `run` holds another cascade, or this step or a later one of a U-Net.
    """
    write_config(run, imagen.config, text_encoder=imagen.text_encoder)
    for number, unet in enumerate(imagen.unets, 1):
        if isinstance(unet, nn.NullUnet):
            continue
        params = nnx.to_pure_dict(nnx.split(unet)[1])
        with open_manager(run, number) as manager:
            save_step(manager, step, {"params": params}, {"step": step})


def _torn(step: Path) -> bool:
    """Whether a file is empty: Orbax writes none."""
    return any(file.is_file() and not file.stat().st_size for file in step.rglob("*"))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _read_json(run: str | os.PathLike) -> dict[str, Any]:
    path = Path(run) / "config.json"
    if not path.is_file():
        raise UserError(f"{run} is no run directory: it has no config.json.")
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}.") from error
    if not isinstance(data, dict) or "imagen" not in data:
        raise UserError(f"{path} has no entry 'imagen'.")
    return data
