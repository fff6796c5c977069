"""Reads DeepFloyd IF's folders, in diffusers' layout or the original's; writes diffusers'.

A folder in diffusers' layout is one stage: unet/config.json,
unet/diffusion_pytorch_model.safetensors (or .bin, in shards, or of a variant such as fp16),
scheduler/scheduler_config.json. The original has config.yml and pytorch_model.bin. Weights are
never downloaded or shipped: DeepFloyd's licence, for non-commercial research, is between its
publisher and those who accept it.
"""

import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
import safetensors.numpy
import yaml

from imagen_jax import nn, storage
from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.diffusion_config import DiscreteConfig, of_stage
from imagen_jax.errors import UserError
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.interop import if_configuration, keys, safetensors_file
from imagen_jax.interop.if_table import IF_UNET, from_original
from imagen_jax.interop.run_dir import RunDir
from imagen_jax.interop.torch_file import read_torch_file
from imagen_jax.types import Params

LICENCE = (
    "note: DeepFloyd IF's weights are under DeepFloyd's licence (research, not commercial "
    "use), which must accompany every copy."
)
T5 = "google/t5-v1_1-xxl"
STEM = "diffusion_pytorch_model"
SHARD = 10 * 10**9  # bytes per file, as in diffusers
Variant = Literal["fp16", "bf16"]
VARIANT_DTYPES = {None: np.float32, "fp16": np.float16, "bf16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Read:
    """One stage as read from its folder. `params` are views of the files."""

    folder: Path
    unet: IFUnetConfig
    size: int
    params: Params
    schedule: "Schedule"


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What is read from a stage's scheduler."""

    betas: str = "squaredcos_cap_v2"
    steps: int = 1000
    thresholding: bool = True
    percentile: float = 0.95
    most: float = 1.5


def read(folder: Path, variant: Variant | None = None) -> Read:
    """A stage, in either layout. Raises UserError for what is missing or does not fit."""
    if (folder / "unet" / "config.json").is_file():
        unet, size = _named(if_configuration.from_diffusers, folder / "unet" / "config.json")
        state = dict(_tensors(folder / "unet", variant))
        schedule = _scheduler(folder / "scheduler" / "scheduler_config.json", unet)
    elif (folder / "config.yml").is_file():
        unet, size = _named(if_configuration.from_original, folder / "config.yml")
        state = from_original(read_torch_file(folder / "pytorch_model.bin"), unet)
        schedule = Schedule(most=1.0 if unet.lowres_cond else 1.5)
    else:
        raise UserError(
            f"{folder} is not a folder of DeepFloyd IF: it has neither unet/config.json "
            "(diffusers) nor config.yml (the original)."
        )
    params = keys.to_jax(state, nn.abstract(unet)[1], prefix=f"{folder}: ", table=IF_UNET)
    return Read(folder, unet, size, params, schedule)


def cascade(stages: Sequence[Read]) -> ImagenConfig:
    """The configuration of the stages, from small to large; the first may be a super-resolution
    stage. Raises UserError for stages that do not follow each other."""
    stages = list(stages)
    if [one.unet.lowres_cond for one in stages[1:]] != [True] * (len(stages) - 1):
        raise UserError("only the first folder can be a base; the others must be super-resolution.")
    alone = stages[0].unet.lowres_cond
    sizes = [stages[0].size // 4] * alone + [one.size for one in stages]
    schedules = [stages[0].schedule] * alone + [one.schedule for one in stages]
    first = schedules[0]
    for name in ("betas", "steps", "percentile"):
        if len({getattr(one, name) for one in schedules}) > 1:
            raise UserError(f"the stages' schedulers differ in {name}.")
    if len({one.unet.text_embed_dim for one in stages}) > 1:
        raise UserError("the stages need text embeddings of different widths.")
    return ImagenConfig(
        unets=tuple([NullUnetConfig()] * alone + [one.unet for one in stages]),
        image_sizes=tuple(sizes),
        text_encoder_name=T5,
        text_embed_dim=stages[0].unet.text_embed_dim,
        timesteps=tuple(50 if i else 100 for i in range(len(sizes))),
        dynamic_thresholding=tuple(one.thresholding for one in schedules),
        dynamic_thresholding_percentile=first.percentile,
        discrete=DiscreteConfig(
            betas=first.betas,
            num_train_timesteps=first.steps,
            sample_max_value=tuple(one.most for one in schedules),
        ),
        resize_mode="bilinear_corners",
        lowres_sample_noise_level=0.25,
        per_sample_random_aug_noise_level=True,
    )


def write(
    folder: Path, run: RunDir, number: int, weights: Literal["ema", "online"], variant: str | None
) -> None:
    """Writes a U-Net of a run as a folder that diffusers' `IFPipeline.from_pretrained` loads,
    without a text encoder. Raises UserError for a U-Net of another kind."""
    config = run.config
    unet, size = config.unets[number - 1], config.image_sizes[number - 1]
    if not isinstance(unet, IFUnetConfig) or config.discrete is None:
        raise UserError(f"U-Net {number} of {run.path} is not one of DeepFloyd IF.")
    if not isinstance(size, int):
        raise UserError(
            f"U-Net {number} is {size[0]} x {size[1]}: diffusers supports only square images."
        )
    described = if_configuration.to_diffusers(unet, size)
    scheduler = {
        "_class_name": "DDPMScheduler",
        "beta_schedule": of_stage(config.discrete.betas, number - 1),
        "clip_sample": True,
        "dynamic_thresholding_ratio": config.dynamic_thresholding_percentile,
        "num_train_timesteps": config.discrete.num_train_timesteps,
        "prediction_type": "epsilon",
        "sample_max_value": of_stage(config.discrete.sample_max_value, number - 1),
        "thresholding": config.per_stage("dynamic_thresholding")[number - 1],
        "variance_type": "learned_range" if unet.learned_variance else "fixed_small",
    }
    parts = {"unet": described, "scheduler": scheduler}
    if unet.lowres_cond:
        names = ("_class_name", "beta_schedule", "num_train_timesteps")
        parts["image_noising_scheduler"] = {name: scheduler[name] for name in names}
    absent = ("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "watermarker")
    index = {
        "_class_name": "IFSuperResolutionPipeline" if unet.lowres_cond else "IFPipeline",
        "requires_safety_checker": False,
        **{name: [None, None] for name in absent},
        **{name: ["diffusers", part["_class_name"]] for name, part in parts.items()},
    }
    _write_json(folder / "model_index.json", index)
    for name, part in parts.items():
        kind = "config.json" if name == "unet" else "scheduler_config.json"
        _write_json(folder / name / kind, part)
    dtype = VARIANT_DTYPES[variant]
    state = keys.to_torch(run.params(number, weights), table=IF_UNET)
    _write_tensors(folder / "unet", state, dtype, f".{variant}" if variant else "")


def _named(parse: Any, path: Path) -> tuple[IFUnetConfig, int]:
    """Reads a configuration file; errors name the file."""
    try:
        if path.suffix == ".yml":
            data = yaml.safe_load(path.read_text())
            if not isinstance(data, Mapping):
                raise UserError("is not a mapping.")
        else:
            data = storage.read_object(storage.folder(path))
        return parse(data)
    except (UserError, yaml.YAMLError) as error:
        raise UserError(f"{path}: {error}") from error


def _scheduler(path: Path, unet: IFUnetConfig) -> Schedule:
    """Raises UserError for another kind of diffusion, or another use of the network's output."""
    if not path.is_file():
        raise UserError(f"{path} is missing.")
    data = storage.read_object(storage.folder(path))
    variance = data.get("variance_type", "fixed_small")
    if data.get("prediction_type", "epsilon") != "epsilon":
        raise UserError(f"{path}: prediction_type = {data['prediction_type']!r}, not 'epsilon'.")
    if unet.learned_variance != (variance == "learned_range"):
        learns = "learns" if unet.learned_variance else "does not learn"
        raise UserError(f"{path}: variance_type = {variance!r}; the network {learns} the variance.")
    return Schedule(
        betas=data.get("beta_schedule", "linear"),
        steps=data.get("num_train_timesteps", 1000),
        thresholding=data.get("thresholding", False),
        percentile=float(data.get("dynamic_thresholding_ratio", 0.995)),
        most=float(data.get("sample_max_value", 1.0)),
    )


def _tensors(folder: Path, variant: Variant | None) -> Iterator[tuple[str, np.ndarray]]:
    """All tensors in a U-Net's folder, as views of its files; safetensors are preferred to .bin."""
    middle = f".{variant}" if variant else ""
    for end in ("safetensors", "bin"):
        file = folder / f"{STEM}{middle}.{end}"
        index = folder / f"{STEM}.{end}.index{middle}.json"
        if file.is_file():
            files = [file]
        elif index.is_file():
            named = storage.read_object(storage.folder(index)).get("weight_map", {})
            files = [folder / name for name in sorted(set(named.values()))]
        else:
            continue
        for one in files:
            if not one.is_file():
                raise UserError(f"{index} names {one.name}, which is missing.")
            found = safetensors_file.views(one) if end == "safetensors" else read_torch_file(one)
            yield from found.items()
        return
    others = sorted(path.name for path in folder.glob(f"{STEM}*"))
    raise UserError(
        f"{folder} has no {STEM}{middle}.safetensors or .bin"
        + (f"; it has {', '.join(others)} (--variant)." if others else ".")
    )


def _write_tensors(folder: Path, state: Mapping[str, np.ndarray], dtype: Any, middle: str) -> None:
    """Writes safetensors; large ones in shards, with an index."""
    shards, size = [[]], 0
    for name, array in state.items():
        nbytes = array.size * np.dtype(dtype).itemsize
        if shards[-1] and size + nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += nbytes
    where = {}
    for i, names in enumerate(shards, 1):
        part = f"-{i:05}-of-{len(shards):05}" if len(shards) > 1 else ""
        file = f"{STEM}{middle}{part}.safetensors"
        tensors = {name: np.ascontiguousarray(state[name], dtype) for name in names}
        safetensors.numpy.save_file(tensors, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    if len(shards) > 1:
        total = sum(array.size * np.dtype(dtype).itemsize for array in state.values())
        index = {"metadata": {"total_size": total}, "weight_map": where}
        _write_json(folder / f"{STEM}.safetensors.index{middle}.json", index)


def _write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2) + "\n")
