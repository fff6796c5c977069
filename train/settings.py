"""What a training run can be told: the flags of the commands, as frozen data."""

import dataclasses
import json
from pathlib import Path
from typing import Any, Literal

import jax

from imagen_jax.config import ImagenConfig
from imagen_jax.presets import PRESETS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Trains one U-Net of a cascade on captioned pictures."""

    # What to train
    preset: Literal["demo", "imagen", "tiny"] = "demo"
    """Named cascade: `demo` learns on a laptop, `imagen` is the paper's, `tiny` is for tests."""
    config: Path | None = None
    """JSON file of a cascade, instead of a preset; `--print-config` shows what one looks like."""
    print_config: bool = False
    """Print the cascade as JSON and exit."""
    workdir: Path | None = None
    """Run directory of checkpoints, metrics and samples. Default: runs/PRESET."""
    resume: bool = False
    """Continue the run in workdir exactly where it stopped; start it if it has not begun."""
    init_from: Path | None = None
    """Run directory whose weights (the average, where kept) to start from, optimiser fresh."""

    # Data
    data: str = "bundled"
    """`bundled`, a folder of pictures with .txt captions, a .tar shard or a quoted glob of them,
    or tfds:NAME[:SPLIT] as array_record."""
    captions_from: Path | None = None
    """Text file, one caption a line: train on the pictures with these captions only."""
    limit: int | None = None
    """Train on the first so many pictures only."""
    heldout_fraction: float = 0.02
    """Share of the pictures kept for evaluation (the bundled set has a split of its own)."""
    no_captions: bool = False
    """Train an unconditional cascade, captions unread."""
    flip: bool = False
    """Mirror half of the pictures; wrong where captions speak of left and right."""
    workers: int = 0
    """Processes that decode pictures, where the threads of this one are not enough."""
    t5: str | None = None
    """Text encoder: folder or name of a T5, or `demo`. Default: the cascade's text_encoder_name."""

    # Optimisation
    steps: int = 100_000
    """Steps in all, those before a resume included."""
    batch_size: int = 32
    accumulate: int = 1
    """Parts that a batch is split into, one after another, to save memory."""
    optimizer: Literal["adam", "adafactor"] = "adam"
    lr: float = 1e-4
    """Peak learning rate."""
    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-8
    warmup_steps: int | None = None
    """Steps of linear warm-up."""
    cosine_decay_max_steps: int | None = None
    """Step at which a cosine has taken the learning rate to 0. Default: constant."""
    max_grad_norm: float | None = 1.0
    """Gradients are scaled down to this norm."""
    ema: Literal["reference", "plain"] = "reference"
    """Schedule of the average: ema-pytorch's (every 10 steps) or a plain one (every step)."""
    ema_decay: float = 0.9999
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """What the network computes in; `auto` is bfloat16 on accelerators and float32 on a CPU."""
    remat: str | None = None
    """Policy of jax.checkpoint_policies, say nothing_saveable: recompute blocks, save memory."""
    seed: int = 0

    # Watching and keeping
    log_every: int = 50
    eval_every: int = 1000
    """Steps between evaluations: loss per log-SNR bin on held-out and on training pictures."""
    eval_batches: int = 4
    sample_every: int = 1000
    """Steps between sample grids from the averaged weights. 0: none."""
    sample_steps: int = 50
    """Denoising steps of such a grid."""
    cond_scale: float = 3.0
    """Guidance weight of such a grid."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int | None = 3
    """Newest checkpoints to keep. None: all."""
    tensorboard: bool = False
    wandb: str | None = None
    """Project of Weights & Biases to log to."""

    def __post_init__(self):
        for name in ("steps", "batch_size", "accumulate", "log_every", "eval_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name.replace('_', '-')} {getattr(self, name)}: at least 1.")
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"--batch-size {self.batch_size} does not split into --accumulate "
                f"{self.accumulate} equal parts."
            )

    @property
    def run(self) -> Path:
        """The run directory."""
        name = self.preset if self.config is None else self.config.stem
        return self.workdir or Path("runs") / name

    @property
    def compute_dtype(self) -> Any:
        if self.dtype != "auto":
            return jax.numpy.dtype(self.dtype)
        on_cpu = jax.default_backend() == "cpu"
        return jax.numpy.dtype("float32" if on_cpu else "bfloat16")

    def cascade(self) -> ImagenConfig:
        """The cascade to train. Raises ValueError for an unreadable or mistaken file."""
        if self.config is None:
            config = PRESETS[self.preset]()
        else:
            config = ImagenConfig.from_dict(_read(self.config))
        changes = {}
        if self.no_captions:
            changes["condition_on_text"] = False
        if self.t5 is not None:
            changes |= dict(text_encoder_name=self.t5, text_embed_dim=None)
            if not config.condition_on_text or self.no_captions:
                raise ValueError("--t5 has no use in a cascade without captions.")
            changes["text_embed_dim"] = _width(self.t5)
        return dataclasses.replace(config, **changes)

    def record(self) -> dict[str, Any]:
        """The settings as JSON holds them."""
        return json.loads(json.dumps(dataclasses.asdict(self), default=str))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from error
    # A run's own config.json serves as well.
    return data.get("imagen", data)


def _width(name: str) -> int:
    from imagen_jax.config import T5_WIDTHS
    from imagen_jax.text.loading import find_folder, read_config

    return T5_WIDTHS.get(name) or read_config(find_folder(name)).d_model
