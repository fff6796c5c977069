"""Run directories: the configuration, and the parameters of each U-Net, stored by Orbax.

    RUN/config.json          the cascade, and what its weights come from (`run_config`)
    RUN/unet1/STEP/params    online parameters
    RUN/unet1/STEP/ema       their running average, if training keeps one
    RUN/unet1/STEP/opt_state, meta    what else `--resume` needs
    RUN/unet1/STEP/complete.json      the commit marker
    RUN/metrics.jsonl, RUN/samples/   written by training

RUN is a directory, or a URL in an object store (`storage`).

Process 0 writes the commit marker last, after Orbax has finished: a step without it is incomplete.
The marker lists the files that are empty on purpose, so any other empty file means that a power cut
damaged the step. Earlier versions wrote no marker: their steps, which are older than every marked
one, count as complete if Orbax committed them. `choose` selects the step that a loader reads and
reports the ones it skips; `--resume` also skips steps that cannot be read (`Damaged`).
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from flax import nnx
from jax.typing import DTypeLike

from imagen_jax import memory, nn, run_config, storage
from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.errors import UserError, first_line
from imagen_jax.imagen import Imagen
from imagen_jax.sharding import Layout, make_layout, single
from imagen_jax.text import Identity
from imagen_jax.types import Params

Weights = Literal["ema", "online"]
ITEMS: dict[Weights, str] = {"online": "params", "ema": "ema"}
MARKER = "complete.json"
CONCURRENT_GB = 1  # arrays being read or written at once, where memory is bounded


class Damaged(UserError):
    """A step exists but cannot be read."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """The step and weights that a loader reads for one U-Net."""

    step: int
    weights: Weights  # "online" also if the average was requested but none is stored
    notes: tuple[str, ...] = ()  # one line per skipped step, with the reason


class PassedOver(UserWarning):
    """A newer step exists but is incomplete, or the step that was read has no commit marker."""


def stage_path(run: str | os.PathLike, unet_number: int) -> epath.Path:
    """The directory of a U-Net's steps: absolute, as Orbax requires."""
    run = storage.folder(run)
    return (run if storage.is_remote(run) else run.resolve()) / f"unet{unet_number}"


class Writer:
    """Writes the steps of one U-Net in ascending order, through Orbax. A context manager, which
    exits once everything is on disk. Every process of a run opens one and makes the same calls.

    Opening it removes the remains of interrupted saves, so readers use `choose` and `restore`
    instead. The newest `keep` steps are kept.

    With `bounded_memory`, saving is synchronous and writes one file per array, a few at a time;
    arrays may be views of a file. Orbax's default format holds everything in memory until the end
    (measured: 2.0 times the size of the arrays, against 1.1).
    """

    def __init__(
        self,
        run: str | os.PathLike,
        unet_number: int,
        *,
        keep: int | None = None,
        bounded_memory: bool = False,
    ):
        self.path, self.unmarked = stage_path(run, unet_number), None
        storage.check_clients(self.path)
        handlers = None
        if bounded_memory:
            arrays = ocp.PyTreeCheckpointHandler(save_concurrent_gb=CONCURRENT_GB, use_ocdbt=False)
            handlers = dict.fromkeys(ITEMS.values(), arrays) | {"meta": ocp.JsonCheckpointHandler()}
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=not bounded_memory
        )
        self.manager = ocp.CheckpointManager(self.path, options=options, item_handlers=handlers)

    def save(self, step: int, trees: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
        """Starts writing a step, once the previous one is complete. Returns when the arrays are
        copied, not when they are on disk.

        Raises UserError, and writes nothing, if the directory holds this step or a later one.
        """
        self.wait()
        newest = self.manager.latest_step()
        if newest is not None and newest >= step:
            raise UserError(f"{self.path} is at step {newest}: step {step} cannot be added.")
        items = {name: ocp.args.PyTreeSave(tree) for name, tree in trees.items()}
        args = ocp.args.Composite(**items, meta=ocp.args.JsonSave(dict(meta)))
        self.manager.save(step, args=args)
        self.unmarked = step

    def poll(self) -> None:
        """Writes the commit marker if Orbax has finished the step. Call it often."""
        if self.unmarked is not None and not self.manager.is_saving_in_progress():
            self._mark()

    def wait(self) -> None:
        """Waits until everything is on disk. Raises any error of the save."""
        self.manager.wait_until_finished()
        self._mark()

    def _mark(self) -> None:
        """Writes the commit marker, on process 0 only, once the step has its final name."""
        step = self.unmarked
        if step is None or step not in ocp.utils.checkpoint_steps(self.path):
            return
        self.unmarked = None
        if jax.process_index():
            return
        path = self.path / str(step)
        empty = [] if storage.is_remote(path) else _empty_files(path)
        storage.write_text(path / MARKER, json.dumps({"empty": empty}) + "\n")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_) -> None:
        try:
            if kind is None:
                self.wait()
        finally:
            self.manager.close()
            self._mark()


def write(
    run: str | os.PathLike,
    config: ImagenConfig,
    weights: Mapping[int, Mapping[Weights, Params]],
    steps: Mapping[int, int],
    origin: Mapping[str, Any] | None = None,
    text_encoder: Identity | None = None,
) -> None:
    """Writes a configuration and one step of each U-Net with bounded memory.

    Raises UserError if `run` holds another cascade, or this step or a later one of a U-Net.
    """
    run_config.write(run, config, origin=origin, text_encoder=text_encoder)
    for number, trees in weights.items():
        items = {ITEMS[which]: tree for which, tree in trees.items()}
        with Writer(run, number, bounded_memory=True) as writer:
            writer.save(steps[number], items, {"step": steps[number]})


def _empty_files(step: epath.Path) -> list[str]:
    """Relative paths of the empty files. (An object store does not lose what it has accepted.)"""
    sizes = {os.path.relpath(file, step): file.stat().length for file in storage.files(step)}
    return sorted(name for name, size in sizes.items() if not size)


def steps(run: str | os.PathLike, unet_number: int) -> list[int]:
    """The steps of a U-Net in a run, newest first, including incomplete ones."""
    path = stage_path(run, unet_number)
    return sorted(ocp.utils.checkpoint_steps(path), reverse=True) if path.is_dir() else []


def latest_step(run: str | os.PathLike, unet_number: int) -> int | None:
    """The newest complete step of a U-Net in a run; None if there is none."""
    choice = choose(run, unet_number)
    return choice and choice.step


def incomplete(run: str | os.PathLike, unet_number: int) -> dict[int, str]:
    """The incomplete steps, newest first, each with the reason."""
    return {step: reason for step, reason in _surveyed(run, unet_number) if reason}


def _surveyed(run: str | os.PathLike, unet_number: int) -> Iterator[tuple[int, str | None]]:
    """Yields every step, newest first, and why it is incomplete, or None. Lazy, because a training
    run may be deleting the oldest steps meanwhile."""
    path, found = stage_path(run, unet_number), steps(run, unet_number)
    marked = {step for step in found if (path / str(step) / MARKER).exists()}
    for step in found:
        earlier = step < min(marked, default=step + 1)  # written by an earlier version
        if step not in marked and not earlier:
            yield step, "it has no commit marker"
        else:
            lost = _lost_files(path / str(step))
            yield step, f"{lost[0]} is empty" if lost else None


def _lost_files(step: epath.Path) -> list[str]:
    """Files that are empty now but were not when the step was committed."""
    if storage.is_remote(step):
        return []
    empty = _empty_files(step)
    if MARKER in empty or not empty or not (step / MARKER).exists():
        return empty
    meant = storage.read_object(step / MARKER).get("empty", [])
    return [name for name in empty if name not in meant]


def choose(run: str | os.PathLike, unet_number: int, weights: Weights = "ema") -> Choice | None:
    """Chooses the newest complete step of a U-Net; None if there is none.

    "ema" becomes "online" if the step has no average (as written by `save`).
    """
    path, passed = stage_path(run, unet_number), {}
    for step, reason in _surveyed(run, unet_number):
        if reason is None:
            break
        passed[step] = reason
    else:
        return None
    notes = [
        f"{path}: step {newer} is not complete ({reason}); step {step} is used."
        for newer, reason in passed.items()
    ]
    if not (path / str(step) / MARKER).exists():
        notes.append(
            f"{path}: step {step} was written by an earlier version, without a commit marker."
        )
    if weights == "ema" and not (path / str(step) / ITEMS["ema"]).is_dir():
        weights = "online"
    return Choice(step, weights, tuple(notes))


def set_aside(run: str | os.PathLike, unet_number: int, step: int) -> None:
    """Renames a step that cannot be read to `STEP.damaged`, so that its number is free."""
    path = stage_path(run, unet_number) / str(step)
    storage.move(path, path.with_name(f"{step}.damaged"))


def restore(
    run: str | os.PathLike,
    unet_number: int,
    step: int,
    item: str,
    target: Any,
    *,
    as_numpy: bool = False,
) -> Any:
    """Reads one tree of a step, placed by the shardings of `target`'s `ShapeDtypeStruct`s; with
    `as_numpy`, as NumPy arrays in the stored dtypes, with bounded memory.

    Raises `Damaged` if the tree is missing, has other shapes or cannot be read.
    """
    path = _item_path(run, unet_number, step, item)
    with ocp.Checkpointer(_reader()) if as_numpy else ocp.StandardCheckpointer() as checkpointer:
        try:
            if not as_numpy:
                return checkpointer.restore(path, target)
            arrays = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
            args = ocp.args.PyTreeRestore(item=target, restore_args=arrays)
            return checkpointer.restore(path, args=args)
        except (ValueError, KeyError, OSError) as error:
            raise _failure(path, error, "is damaged, or has another architecture") from error


def stored_shapes(run: str | os.PathLike, unet_number: int, step: int, item: str) -> Any:
    """The tree of a step with, for each array, an object that has its `shape`. Raises `Damaged`."""
    path = _item_path(run, unet_number, step, item)
    with ocp.Checkpointer(_reader()) as checkpointer:
        try:
            return checkpointer.metadata(path).item_metadata.tree
        except (ValueError, KeyError, OSError) as error:
            raise _failure(path, error) from error


def _item_path(run: str | os.PathLike, unet_number: int, step: int, item: str) -> epath.Path:
    path = stage_path(run, unet_number)
    if not (path / str(step) / item).is_dir():
        raise Damaged(f"{path} has no {item} for step {step}.")
    return path / str(step) / item


def _reader() -> ocp.PyTreeCheckpointHandler:
    return ocp.PyTreeCheckpointHandler(restore_concurrent_gb=CONCURRENT_GB)


def read_meta(run: str | os.PathLike, unet_number: int, step: int) -> dict[str, Any]:
    """The metadata that training stored with a step. Raises `Damaged`."""
    path = stage_path(run, unet_number) / str(step) / "meta"
    with ocp.Checkpointer(ocp.JsonCheckpointHandler()) as checkpointer:
        try:
            return checkpointer.restore(path)
        except (ValueError, OSError) as error:
            raise _failure(path, error) from error


def _failure(path: epath.Path, error: Exception, what: str = "is damaged") -> UserError:
    """`Damaged`; or, if the disk or the store failed, an error for which no step is skipped."""
    if storage.is_passing(error):
        return UserError(f"{path} cannot be read now; run the command again: {first_line(error)}")
    return Damaged(f"{path} {what}: {first_line(error)}")


def load_params(
    run: str | os.PathLike,
    unet_number: int,
    choice: Choice,
    *,
    layout: Layout | None = None,
    dtype: DTypeLike = jnp.float32,
) -> Params:
    """Loads one U-Net's parameters, placed by `layout`; by default on one device.

    A `dtype` other than float32 is for networks that are not trained (`nn.stored_dtypes`).
    Raises `Damaged`, and a UserError that names the array if values are not finite.
    """
    config = run_config.read(run).unets[unet_number - 1]
    shapes = nn.stored_shapes(nn.abstract(config)[1], dtype)
    target = (layout or single()).targets(shapes)
    params = restore(run, unet_number, choice.step, ITEMS[choice.weights], target)
    check_finite(
        params, f"{stage_path(run, unet_number)}, step {choice.step}, {choice.weights} weights"
    )
    return params


def check_finite(tree: Any, where: str) -> None:
    """Raises UserError for the first array of a tree with NaN or infinity. If arrays are
    distributed over machines, every process checks its own part."""
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        parts = [leaf]
        if isinstance(leaf, jax.Array):
            parts = [part.data for part in leaf.addressable_shards if part.replica_id == 0]
        bad = sum(np.count_nonzero(~np.isfinite(np.asarray(part))) for part in parts)
        if bad:
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            where = f"{where}: {name}" if name else where
            raise UserError(f"{where} holds NaN or infinity ({bad:,} of {leaf.size:,} values).")


def load(
    run: str | os.PathLike,
    *,
    weights: Weights = "ema",
    dtype: DTypeLike = jnp.float32,
    param_dtype: DTypeLike = jnp.float32,
    mesh: str | Layout | None = None,
    unet_numbers: Sequence[int] | None = None,
    choices: Mapping[int, Choice] | None = None,
    on_host: bool = False,
) -> Imagen:
    """Loads the cascade of a run directory, with the newest weights of its U-Nets.

    The networks compute in `dtype`. Parameters are read in `param_dtype`: float32 for training;
    for sampling only, `dtype` gives the same results. `mesh`, e.g. "8x1" or "auto", distributes
    them over devices, each of which reads its part. With `on_host` they wait in the host's memory,
    and are on the devices only while their stage samples.
    `unet_numbers` selects the U-Nets to load. Those not loaded, or never trained, are `NullUnet`s,
    which `Imagen.sample` rejects.
    `weights` "ema" falls back to the online ones if no average is stored. Newer steps that are
    incomplete are skipped with a warning (`PassedOver`). `choices` (from `choose_all`) replace this
    selection, without warnings. Raises UserError if `run` holds no cascade, or weights are not
    finite.
    """
    config = run_config.read(run)
    layout = make_layout(mesh) if isinstance(mesh, str) else mesh
    if choices is None:
        choices = choose_all(run, config, weights, unet_numbers)
        for note in (note for choice in choices.values() for note in choice.notes):
            warnings.warn(note, PassedOver, stacklevel=2)
    unets = [nn.NullUnet() for _ in config.unets]
    for number, choice in choices.items():
        params = load_params(run, number, choice, layout=layout, dtype=param_dtype)
        if on_host:
            params = memory.to_host(params)
        unets[number - 1] = nn.bind(config.unets[number - 1], params, dtype=dtype)
    return Imagen(
        config, unets=unets, layout=layout, text_encoder=run_config.read_text_encoder(run)
    )


def choose_all(
    run: str | os.PathLike,
    config: ImagenConfig,
    weights: Weights = "ema",
    unet_numbers: Sequence[int] | None = None,
) -> dict[int, Choice]:
    """`choose` for the U-Nets of a cascade that have weights, or those of `unet_numbers`."""
    found = {
        number: choose(run, number, weights)
        for number, unet in enumerate(config.unets, 1)
        if not isinstance(unet, NullUnetConfig) and (unet_numbers is None or number in unet_numbers)
    }
    return {number: choice for number, choice in found.items() if choice is not None}


def save(run: str | os.PathLike, imagen: Imagen, *, step: int = 0) -> None:
    """Writes configuration and parameters, for `load`.

    Raises UserError if `run` holds another cascade, or this step or a later one of a U-Net.
    """
    run_config.write(run, imagen.config, text_encoder=imagen.text_encoder)
    for number, unet in enumerate(imagen.unets, 1):
        if isinstance(unet, nn.NullUnet):
            continue
        params = nnx.to_pure_dict(nnx.split(unet)[1])
        with Writer(run, number) as writer:
            writer.save(step, {"params": params}, {"step": step})
