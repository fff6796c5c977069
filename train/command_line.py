"""The command line of training, as `Settings`.

Defaults come from the run directory's record (--resume), from the run that the cascade is from, or
from the preset's recipe. A few flags decide which, and are read first, so that --help shows these
defaults too.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from etils import epath

import commands
from imagen_jax import run_config, storage
from imagen_jax.data import Opening
from imagen_jax.data.sources import gathered
from imagen_jax.errors import flags
from imagen_jax.presets import PRESETS, RECIPES
from train.settings import SECTIONS, Optimization, Settings, Watching

CONFIG = "config.json"
PATHS = {"captions_from", "init_from", "continue_from", "embeddings"}
# What belongs to one start of a run only.
ONE_START = ("resume", "print_config", "profile", "coordinator", "process_id", "num_processes")
# What the stages of a run share: the pictures and their captions.
SHARED = (
    *(field.name for field in dataclasses.fields(Opening)),
    *("captions_from", "no_captions", "flip", "t5", "embeddings"),
)


def parse(description: str | None, *more: type, unet_number: str = "1") -> tuple[Any, ...]:
    """The command line as Settings, after one object per dataclass in `more`.

    `unet_number` is the U-Net whose recipe and record give the defaults, unless --unet-number names
    another. Raises UserError if a given run directory has no cascade.
    """
    words = gathered(sys.argv[1:])
    first = _first(words, unet_number)
    defaults = _defaults(first, commands.stage_number(first.unet_number))
    sections = [
        *((kind.__name__.lower(), _shown(kind, kind())) for kind in more),
        *(
            (kind.__name__.lower(), _shown(kind, defaults.section(kind), again=first.resume))
            for kind in SECTIONS
        ),
    ]
    command = dataclasses.make_dataclass("command", sections)
    script = Path(sys.argv[0])
    program = f"python -m {script.parent.name}.{script.stem}"
    found = tyro.cli(command, prog=program, description=description, args=words)
    parts = [vars(part) for part in vars(found).values()]
    others = [kind(**part) for kind, part in zip(more, parts, strict=False)]
    values = {name: value for part in parts[len(more) :] for name, value in part.items()}
    return *others, Settings(**values)


def _first(words: Sequence[str], unet_number: str) -> argparse.Namespace:
    """The flags that decide the defaults of the others. Mistakes in them are left to the parser of
    all flags."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name in ("preset", "config", "workdir", "init-from", "continue-from"):
        parser.add_argument(f"--{name}", nargs="?")
    parser.add_argument("--unet-number", nargs="?", default=unet_number)
    parser.add_argument("--resume", action="store_true")
    found, _ = parser.parse_known_args([_with_dashes(word) for word in words])
    return found


def _with_dashes(word: str) -> str:
    """`--init_from=A_B` as `--init-from=A_B`: tyro accepts both."""
    flag, equals, value = word.partition("=")
    return flag.replace("_", "-") + equals + value if flag.startswith("--") else word


def _defaults(first: argparse.Namespace, unet_number: int) -> Settings:
    """The settings if no other flag is given."""
    preset = first.preset if first.preset in PRESETS else None
    config = None if first.config is None else Path(first.config)
    workdir = None if first.workdir is None else Path(first.workdir)
    run = Settings(preset=preset, config=config, workdir=workdir).run
    saved = recorded(run, unet_number) if first.resume else None
    if saved is not None:
        return saved if preset is None else dataclasses.replace(saved, preset=preset, config=None)
    values: dict[str, Any] = {"preset": preset}
    if first.preset is None and config is None:
        other = first.init_from or first.continue_from
        values = _of_run(run if workdir or not other else None, other)
    recipes = RECIPES.get(values["preset"], ())
    if unet_number <= len(recipes):
        values |= dataclasses.asdict(recipes[unet_number - 1])
    return Settings(**values)


def recorded(run: epath.Path, unet_number: int) -> Settings | None:
    """The settings that a run directory has recorded for a U-Net, including its own cascade, but
    without what belongs to one start only (`ONE_START`); None if it has none."""
    found = run_config.read_training(run, unet_number)
    if found is None:
        return None
    values = {name: value for name, value in _values(found, run).items() if name not in ONE_START}
    return Settings(**values | dict(resume=True, workdir=Path(run), config=Path(run / CONFIG)))


def _of_run(run: epath.Path | None, other: str | None) -> dict[str, Any]:
    """Which cascade to use if no flag names one: that of the run directory, with the pictures that
    its stages were trained on; that of `other`, whose weights it starts from; or the demo's."""
    if run is not None and (run / CONFIG).exists():
        trained = _values(run_config.read_any_training(run), run)
        shared = {name: trained[name] for name in SHARED if name in trained}
        return shared | dict(config=Path(run / CONFIG), workdir=Path(run), preset=_preset(trained))
    if other is None:
        return {"preset": "demo"}
    folder = storage.folder(other)
    run_config.read(folder)  # raises if there is none
    return dict(config=Path(folder / CONFIG), preset=_preset(run_config.read_any_training(folder)))


def _preset(training: Mapping[str, Any]) -> str | None:
    """The preset of recorded settings, if it still exists."""
    return training.get("preset") if training.get("preset") in PRESETS else None


def _values(found: Mapping[str, Any], run: epath.Path) -> dict[str, Any]:
    """A run's recorded settings in their types, without those that no longer exist."""
    fields = {field.name for field in dataclasses.fields(Settings)}
    values = {name: value for name, value in found.items() if name in fields}
    if isinstance(values.get("data"), str):  # of an older run
        values["data"] = (values["data"],)
    values |= {name: tuple(values[name]) for name in ("data", "where", "buckets") if name in values}
    if values.get("t5") is not None:
        values["t5"] = run_config.encoder_place(run, values["t5"])
    return values | {name: values[name] and Path(values[name]) for name in PATHS & values.keys()}


def _shown(kind: type, defaults: Any, again: bool = False) -> Any:
    """A section as tyro shows it: flat names, switches without a `--no-` twin, and no `None` where
    leaving the flag out means the same. `again`: has both, to undo recorded values."""
    marks = [tyro.conf.OmitArgPrefixes]
    if not again:
        marks.append(tyro.conf.FlagCreatePairsOff)
    if kind not in (Optimization, Watching) and not again:
        marks.append(tyro.conf.DisallowNone)
    return Annotated[(flags(kind, defaults), *marks)]
