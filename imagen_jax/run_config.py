"""`RUN/config.json`: which cascade a run directory holds, and what its weights come from.

    {"imagen": ImagenConfig,
     "training": {"unet1": settings, ...},
     "origin": what was recorded about the file that weights were converted from,
     "text_encoder": name and hash of the one used in training}

All but the first are present only if known. `checkpoint` reads and writes the weights beside it.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from imagen_jax import storage
from imagen_jax.config import ImagenConfig
from imagen_jax.errors import UserError
from imagen_jax.fields import first_difference
from imagen_jax.text import Identity


def read(run: str | os.PathLike) -> ImagenConfig:
    """The cascade of a run directory. Raises UserError if there is none."""
    return with_encoder(run, ImagenConfig.from_dict(_read_json(run)["imagen"]))


def with_encoder(run: str | os.PathLike, config: ImagenConfig) -> ImagenConfig:
    """The cascade with the place where its text encoder is now."""
    name = encoder_place(run, config.text_encoder_name)
    return dataclasses.replace(config, text_encoder_name=name)


def encoder_place(run: str | os.PathLike, name: str) -> str:
    """The folder or name of a text encoder; if the folder is gone, the one of that name in the run
    directory, moved or copied together with the run. A name without a folder, as `demo`, stays."""
    inside = Path(run) / Path(name).name
    gone = Path(name).name != name and not Path(name).is_dir()
    return str(inside) if gone and (inside / "config.json").is_file() else name


def read_origin(run: str | os.PathLike) -> dict[str, Any] | None:
    """What was recorded about the file that the weights were converted from, or None."""
    return _read_json(run).get("origin")


def read_text_encoder(run: str | os.PathLike) -> Identity | None:
    """The text encoder that a run was trained with; None if there is no record, or no run."""
    if not (storage.folder(run) / "config.json").exists():
        return None
    found = _read_json(run).get("text_encoder")
    return None if found is None else Identity.from_dict(found)


def read_training(run: str | os.PathLike, unet_number: int) -> dict[str, Any] | None:
    """The settings that a U-Net was last trained with; None if it was not trained here."""
    if not (storage.folder(run) / "config.json").exists():
        return None
    return _read_json(run).get("training", {}).get(f"unet{unet_number}")


def read_any_training(run: str | os.PathLike) -> dict[str, Any]:
    """The settings that the first of a run's U-Nets was trained with; {} if none was."""
    found = _read_json(run).get("training", {})
    return found[min(found)] if found else {}


def write(
    run: str | os.PathLike,
    config: ImagenConfig,
    training: Mapping[str, Any] | None = None,
    *,
    origin: Mapping[str, Any] | None = None,
    text_encoder: Identity | None = None,
) -> None:
    """Writes `config.json`, adding `training` (`{"unet1": settings}`) to an existing file.

    A run directory holds one cascade. Raises UserError, and writes nothing, if it holds another.
    """
    path = storage.folder(run) / "config.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    with storage.alone(path.parent):
        check(run, config)
        data = _read_json(run) if path.exists() else {}
        data["imagen"] = config.to_dict()
        data["training"] = data.get("training", {}) | dict(training or {})
        if origin is not None:
            data["origin"] = dict(origin)
        if text_encoder is not None:
            text_encoder.check(read_text_encoder(run), str(run))
            data["text_encoder"] = text_encoder.to_dict()
        storage.write_text(path, json.dumps(data, indent=2) + "\n")


def check(run: str | os.PathLike, config: ImagenConfig) -> None:
    """Raises UserError if the run directory exists and holds another cascade.

    If the identity of the text encoder is recorded, that counts, and not where its files are.
    """
    path = storage.folder(run) / "config.json"
    if not path.exists():
        return
    there = read(run)
    if read_text_encoder(run) is not None:
        there = dataclasses.replace(there, text_encoder_name=config.text_encoder_name)
    difference = first_difference(there, config)
    if difference:
        raise UserError(f"{path} describes another cascade: {difference}.")


def _read_json(run: str | os.PathLike) -> dict[str, Any]:
    path = storage.folder(run) / "config.json"
    if not path.exists():
        raise UserError(f"{run} is not a run directory: it has no config.json.")
    data = storage.read_object(path)
    if "imagen" not in data:
        raise UserError(f"{path} has no entry 'imagen'.")
    return data
