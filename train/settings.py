"""The settings of a training run: the flags of the commands, as frozen data.

Five sections, which are the sections of `--help`; `Settings` is all of them in one.
"""

import dataclasses
import json
import re
import textwrap
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from etils import epath

import commands
from imagen_jax import nn, run_config, sharding, storage
from imagen_jax.config import ImagenConfig, UnetConfig
from imagen_jax.data import Opening
from imagen_jax.errors import UserError
from imagen_jax.interop import configuration
from imagen_jax.presets import PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Run:
    """The cascade to train, where to start from and where to save it."""

    preset: Literal["demo", "scenes", "imagen", "paper", "tiny"] | None = None
    """Named cascade: `demo` and `scenes` train on a laptop, `imagen` has imagen-pytorch's U-Nets at
    the paper's size, `paper` has the paper's own base, `tiny` is for tests. If a preset has a
    recipe, it sets the defaults for steps, batch size, optimiser, learning rate, warm-up and EMA.
    Default: the cascade of the run directory, or of the run that the weights come from; otherwise
    demo."""
    config: Path | None = None
    """JSON file that describes a cascade, instead of a preset: the fields that differ from the
    defaults (`--print-config` prints all fields); a run's config.json; or the `imagen` part of
    imagen-pytorch's imagen_config.json."""
    print_config: bool = False
    """Print the cascade as JSON and exit."""
    workdir: Path | None = None
    """Run directory for checkpoints, metrics and samples. Default: runs/PRESET. When another stage
    is trained in it, its cascade and the data of its other stages are the defaults."""
    resume: bool = False
    """Continue the run in workdir exactly where it stopped, with its recorded settings. Flags given
    with it override them, and each change is printed. Starts a new run if there is none."""
    init_from: Path | None = None
    """Run directory whose weights (the EMA, if it has one) to start from, with a new optimiser."""
    continue_from: Path | None = None
    """Run directory to continue from, with its optimiser state and step count, on more pictures or
    with another batch size or learning rate. Each change is printed."""
    steps: int = 100_000
    """Total number of steps, including those before a resume."""
    seed: int = 0
    """Random seed for the initial weights, the order of the pictures and the noise."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Data(Opening):
    """Pictures and captions."""

    captions_from: Path | None = None
    """Text file, one caption a line: train on the pictures with these captions only."""
    limit: int | None = None
    """Train on the first N pictures only."""
    no_captions: bool = False
    """Train an unconditional cascade; captions are not read."""
    flip: bool = False
    """Mirror half of the pictures. Do not use it if captions mention left and right."""
    crop: Literal["center", "random"] = "center"
    """Which part of a picture to keep where its aspect ratio is not the stage's."""
    small: Literal["skip", "upsample"] = "skip"
    """What to do with pictures that are smaller than the stage's size."""
    buckets: tuple[str, ...] = ()
    """Sizes for aspect-ratio bucketing, as HEIGHTxWIDTH, such as 64x64 48x80 80x48: each picture is
    seen at the size with the nearest aspect ratio, so that less is cropped. Default: only the
    stage's size."""
    threads: int = 4
    """Threads that decode pictures ahead."""
    workers: int = 0
    """Processes that decode pictures instead, where threads are not enough."""
    cache_mb: int = 512
    """Keep decoded pictures in memory if all of them fit in this many megabytes."""
    max_damaged: float = 0.05
    """End the run if more than this share of the pictures is damaged. Otherwise damaged pictures
    are replaced, counted and listed."""
    t5: str | None = None
    """Text encoder: folder or name of a T5, or `demo`. Default: the cascade's text_encoder_name."""
    embeddings: Path | None = None
    """Folder of embeddings written by `python -m imagen_jax.data.embed`, to read instead of running
    the text encoder in every step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Optimization:
    """The training step: all that its compiled program depends on besides the cascade."""

    batch_size: Annotated[int, tyro.conf.arg(aliases=["--batch"])] = 32
    """Pictures per step."""
    accumulate: int = 1
    """Parts to split a batch into, run one after another to save memory."""
    optimizer: Literal["adam", "adafactor", "muon"] = "adam"
    """`adafactor` uses far less memory than `adam`; `muon` orthogonalises the updates of hidden
    layers (with learning rates on the scale of Adam's). beta1, beta2 and eps are Adam's."""
    lr: float = 1e-4
    """Peak learning rate."""
    moments: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the optimiser's moments; `bfloat16`, with stochastic rounding, halves their size."""
    beta1: float = 0.9
    """Decay of the first moment: the running average of the gradients."""
    beta2: float = 0.99
    """Decay of the second moment: the running average of the squared gradients."""
    eps: float = 1e-8
    """Added to the square root of the second moment."""
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    cosine_decay_max_steps: int | None = None
    """Step at which cosine decay brings the learning rate to 0. Default: no decay."""
    max_grad_norm: float | None = 1.0
    """Clip gradients to this norm. None: never."""
    ema: Literal["reference", "plain"] = "reference"
    """Schedule of the averaged weights (EMA): ema-pytorch's (every 10 steps) or a plain one (every
    step)."""
    ema_decay: float = 0.9999
    """Maximum decay of the EMA: the most that an update keeps of the old average."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; `auto` is bfloat16 on accelerators and float32 on a CPU.
    On accelerators too, float32 is full precision (no TF32), at several times the cost."""
    remat: str | None = None
    """Policy from jax.checkpoint_policies, such as nothing_saveable: recomputes blocks to save
    memory."""

    @property
    def compute_dtype(self) -> Any:
        return nn.compute_dtype(None if self.dtype == "auto" else self.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Devices:
    """The devices and processes of a run. On a cluster, processes find each other."""

    mesh: str = "auto"
    """Device mesh as DATAxMODEL, such as 8x1: the batch is split over the first axis, channels and
    heads over the second, weights over both. One of the two may be -1, for all remaining devices;
    `auto` uses all devices."""
    coordinator: str | None = None
    """HOST:PORT of process 0, where processes do not find each other."""
    process_id: int | None = None
    """Number of this process, from 0."""
    num_processes: int | None = None
    """Number of processes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Watching:
    """What is measured, sampled and saved, and how often (in steps)."""

    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 1000
    """Steps between evaluations: loss per log-SNR bin on held-out and on training pictures.
    0: none."""
    eval_batches: int = 4
    """Batches per evaluation."""
    sample_every: int = 1000
    """Steps between sample grids from the averaged weights. 0: none."""
    sample_steps: int = 50
    """Denoising steps of these grids."""
    cond_scale: float = 3.0
    """Guidance weight for these grids, and for the images of --compose-every."""
    compose_every: int = 0
    """Steps between composition tests: images of captions about coloured shapes are drawn and
    judged object by object, as evaluate.composition does for a complete cascade. `--data scenes`
    never trains on three of the four kinds of captions. Super-resolution starts from true small
    images. 0: none."""
    compose_images: int = 64
    """Images per composition test and kind of caption (four kinds), each kind in one batch."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int | None = 3
    """Newest checkpoints to keep. None: all."""
    profile: int | None = None
    """Write a trace of this many steps to RUN/profile, for xprof."""
    tensorboard: bool = False
    """Write RUN/tensorboard too (needs tensorboardX)."""
    wandb: str | None = None
    """Project of Weights & Biases to log to (needs wandb)."""


SECTIONS = (Run, Data, Optimization, Devices, Watching)

AT_LEAST = dict(
    steps=1, seed=0, limit=1, threads=1, workers=0, cache_mb=0, batch_size=1, accumulate=1,
    warmup_steps=0, cosine_decay_max_steps=1, log_every=1, eval_every=0, eval_batches=1,
    sample_every=0, sample_steps=1, compose_every=0, compose_images=1,
    save_every=1, keep=1, profile=1, process_id=0, num_processes=1,
)  # fmt: skip
BETWEEN_0_AND_1 = (
    "heldout_fraction",
    "max_damaged",
    "beta1",
    "beta2",
    "ema_decay",
)  # 1 is excluded
POSITIVE = ("lr", "eps", "max_grad_norm")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Watching, Devices, Optimization, Data, Run):
    """Trains one U-Net of a cascade on captioned pictures. ValueError names a mistaken flag."""

    def __post_init__(self):
        for name, least in AT_LEAST.items():
            self._require(name, lambda x, least=least: x >= least, f"at least {least}")
        for name in BETWEEN_0_AND_1:
            self._require(name, lambda x: 0 <= x < 1, "0 or more and less than 1")
        for name in POSITIVE:
            self._require(name, lambda x: x > 0, "more than 0")
        self._require("seed", lambda x: x < 2**32, "less than 2 ** 32")
        if self.batch_size % self.accumulate:
            raise UserError(
                f"--batch-size {self.batch_size} cannot be split into --accumulate "
                f"{self.accumulate} equal parts."
            )
        if None not in (self.init_from, self.continue_from):
            raise UserError("--init-from and --continue-from: give only one of them.")
        if self.mesh != "auto":
            sharding.parse(self.mesh)
        for bucket in self.buckets:
            if not re.fullmatch(r"[1-9]\d{0,5}x[1-9]\d{0,5}", bucket):
                raise UserError(f"--buckets {bucket}: write HEIGHTxWIDTH, as 48x80.")

    @property
    def rows(self) -> int:
        """Pictures that a step processes at once."""
        return self.batch_size // self.accumulate

    def _require(self, name: str, holds: Any, what: str) -> None:
        value = getattr(self, name)
        if value is not None and not holds(value):
            raise UserError(f"{commands.flag(name)} {value}: must be {what}.")

    def section(self, kind: type) -> Any:
        """One of SECTIONS, with these settings' values."""
        names = [field.name for field in dataclasses.fields(kind)]
        return kind(**{name: getattr(self, name) for name in names})

    @property
    def run(self) -> epath.Path:
        """The run directory."""
        name = self.preset or "demo"
        if self.config is not None:  # a run's own file has its name from its folder
            own = self.config.name == "config.json"
            name = self.config.parent.name if own else self.config.stem
        return storage.folder(self.workdir or Path("runs") / name)

    def cascade(self) -> ImagenConfig:
        """The cascade to train. Raises ValueError for an unreadable or invalid file."""
        if self.config is None:
            config = PRESETS[self.preset or "demo"]()
        else:
            config = _read_config(self.config)
        changes = {}
        if self.no_captions:
            changes["condition_on_text"] = False
        if self.t5 is not None:
            if not config.condition_on_text or self.no_captions:
                raise UserError("--t5 is not used in a cascade without captions: leave it out.")
            changes |= dict(text_encoder_name=self.t5, text_embed_dim=_width(self.t5))
        return dataclasses.replace(config, **changes)

    def describe(self) -> str:
        """The settings as text: a paragraph per section, without what is off or not given."""
        lines = []
        for kind in SECTIONS:
            values = vars(self.section(kind)).items()
            fields = [
                name if value is True else f"{name} {spelled(value)}"
                for name, value in values
                if value not in (None, False, ())
                and not (name == "preset" and self.config is not None)
            ]
            lines += textwrap.wrap(
                f"{kind.__name__.lower() + ':':<14}{', '.join(fields)}",
                width=100,
                subsequent_indent=" " * 14,
                break_on_hyphens=False,
            )
        return "\n".join(lines)

    def record(self) -> dict[str, Any]:
        """The settings as JSON-ready values."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def spelled(value: Any) -> str:
    """A value as given on the command line."""
    return " ".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def _read_config(path: Path) -> ImagenConfig:
    """A configuration of ours, or of a complete file for imagen-pytorch's command."""
    data = storage.read_object(storage.folder(path))
    fields = configuration.read_json(path)["imagen"]  # reads a run's config.json too
    try:
        if ("type" in data or "video" in fields) and configuration.is_complete(fields):
            unets = fields["unets"]
            norms = [UnetConfig.norm] * (1 if isinstance(unets, dict) else len(unets))
            return configuration.to_ours(fields, data.get("type", "original"), norms)
        return run_config.with_encoder(path.parent, ImagenConfig.from_dict(fields))
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _width(name: str) -> int:
    from imagen_jax.config import T5_WIDTHS
    from imagen_jax.text.loading import find_folder, read_config

    return T5_WIDTHS.get(name) or read_config(find_folder(name)).d_model
