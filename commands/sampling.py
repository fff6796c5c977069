"""What commands that sample share: their settings, loading the cascade, progress bars.

class Settings(Sampling): ...             # and the command's own flags
pipeline = open_pipeline(given, say)      # with notes on the weights that it uses
pipeline.generate(..., progress=progress_bars, **given.options(pipeline.config))
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import tyro
from etils import epath
from tqdm import tqdm

import commands
from imagen_jax import checkpoint, nn, sharding, storage
from imagen_jax.config import ImagenConfig, NullUnetConfig
from imagen_jax.diffusion import discrete
from imagen_jax.diffusion.grids import SPACINGS
from imagen_jax.diffusion.guidance import SCHEDULES, make_interval
from imagen_jax.diffusion.samplers import SAMPLERS
from imagen_jax.errors import UserError
from imagen_jax.memory import Memory
from imagen_jax.pipeline import Pipeline, own_spacing, sampling_defaults
from imagen_jax.sampling import Progress

T = TypeVar("T")
NotAFlag = Annotated[T, tyro.conf.Suppress, tyro.conf.Fixed]
"""For a field that a command inherits but does not use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How to sample from a trained cascade."""

    checkpoint: Path
    """Run directory of the cascade: what training calls --workdir."""
    weights: checkpoint.Weights = "ema"
    """`ema`: the running average of the parameters; `online`: the parameters themselves."""
    t5: str | None = None
    """Text encoder: folder or name of a T5, or `demo`. Default: the cascade's text_encoder_name.
    An encoder whose weights differ from those used in training is refused."""
    stop_at_unet_number: str | None = None
    """Last U-Net to run: 1, 2, 3 or base, sr256, sr1024. Default: the cascade's last."""

    seed: int = 0
    """Seed of the first image. The seeds of the others are derived from it and their positions; the
    seed recorded in an image's file draws that image again on its own."""
    cond_scale: Annotated[tuple[float, ...] | None, tyro.conf.arg(aliases=["--guidance-scale"])] = (
        None
    )
    """Guidance weight: one for all U-Nets, or one per U-Net; 1 is unguided. Default: 3 for the
    base, 1 for the others; 7 and 4 for discrete-time cascades, such as DeepFloyd IF; 1 for all in a
    cascade that was trained with cond_drop_prob 0."""
    negative_prompt: str = ""
    """Text to steer away from: guidance uses it in place of no text."""
    steps: Annotated[tuple[int, ...] | None, tyro.conf.arg(aliases=["--num-inference-steps"])] = (
        None
    )
    """Denoising steps: one number for all U-Nets, or one per U-Net. Default: 20 15 10."""
    sampler: Literal["cascade", *SAMPLERS] | None = None
    """`dpm++2m`, `dpm++3m` and `heun` (two evaluations per step) need few steps; `ancestral` and
    `dpm++2m-sde` draw noise at every step, `ddim` only at the start (more with --eta). `cascade` is
    the reference's sampler, `ancestral` or (if elucidated) `heun`, with the cascade's `timesteps`.
    Default: dpm++2m, or dpm++2m-sde for discrete-time cascades."""
    spacing: Literal[*SPACINGS, *discrete.SPACINGS] | None = None
    """Spacing of the noise levels: `t` (equal steps of time), `log_snr` or `karras`. Default:
    log_snr, or karras for elucidated cascades; t with `--sampler cascade`. Discrete-time cascades,
    such as DeepFloyd IF, also have `leading`, `trailing` and IF's presets, whose names give their
    number of steps."""
    eta: float = 0.0
    """Noise of ddim, from 0 (none) to 1 (as much as the ancestral sampler's)."""
    guidance_interval: tuple[float, float] | None = None
    """Lowest and highest noise level (sigma / alpha) at which to guide; steps outside cost half.
    Default: guide at all levels."""
    guidance_schedule: Literal[tuple(SCHEDULES)] | None = None
    """How the guidance weight grows from noise to image. Default: it is constant."""
    guidance_rescale: float = 0.0
    """How far to restore the contrast of the unguided image, 0 to 1 (0.7 is usual)."""
    lowres_sample_noise_level: float | None = None
    """Noise added to an image before it is upsampled, 0 to 1; more noise invents more detail.
    Default: the cascade's value."""
    batch_size: int = 8
    """Images drawn at once. This does not change the images: each has its own seed."""
    mesh: str | None = None
    """Device mesh as DATAxMODEL, such as 8x1, or `auto` for all devices: images are split over the
    first axis, channels over the second, weights over both. Default: one device."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; `auto` is bfloat16 on accelerators and float32 on a CPU.
    On accelerators too, float32 is full precision (no TF32), at several times the cost."""
    memory: Memory = "auto"
    """Where the weights of the text encoder and the U-Nets wait while another network runs:
    `resident` keeps them on the device, `streamed` in the host's memory. `auto` streams them if
    they would take more than half of the device's memory."""

    def __post_init__(self):
        counts = [(name, (getattr(self, name),)) for name in self.counts] + [("steps", self.steps)]
        for name, values in counts:
            if values is not None and min(values, default=0) < 1:
                raise UserError(
                    f"{commands.flag(name)} {' '.join(map(str, values))}: must be at least 1."
                )
        for name, last in [("seed", 2**32 - 1)] + [(name, 1) for name in self.fractions]:
            value = getattr(self, name)
            if value is not None and not 0 <= value <= last:
                raise UserError(f"{commands.flag(name)} {value} must lie in 0 .. {last}.")
        if self.mesh not in (None, "auto"):
            sharding.parse(self.mesh)
        if self.guidance_interval is not None:
            make_interval(self.guidance_interval)
        if self.eta and "ddim" not in self.samplers_given:
            raise UserError(f"--eta {self.eta} applies only to --sampler ddim.")

    @property
    def samplers_given(self) -> tuple[str | None, ...]:
        """All samplers to draw with."""
        return (self.sampler,)

    @property
    def counts(self) -> tuple[str, ...]:
        """Names of the fields that count something."""
        return ("batch_size",)

    @property
    def fractions(self) -> tuple[str, ...]:
        """Names of the fields from 0 to 1."""
        return ("eta", "guidance_rescale", "lowres_sample_noise_level")

    @property
    def run(self) -> epath.Path:
        """The run directory."""
        return storage.folder(self.checkpoint)

    @property
    def compute_dtype(self) -> Any:
        return nn.compute_dtype(None if self.dtype == "auto" else self.dtype)

    def last_stage(self, config: ImagenConfig) -> int:
        """Number of the last U-Net to run. Raises ValueError if the cascade has no such U-Net."""
        count = len(config.unets)
        if self.stop_at_unet_number is None:
            return count
        number = commands.stage_number(self.stop_at_unet_number)
        if number > count:
            raise UserError(
                f"--stop-at-unet-number {self.stop_at_unet_number}: the cascade of "
                f"{self.run} has {count} U-Nets."
            )
        return number

    def options(self, config: ImagenConfig) -> dict[str, Any]:
        """The arguments of `Imagen.sample` that these settings decide.

        Raises ValueError for numbers that do not fit the cascade.
        """
        last, count = self.last_stage(config), len(config.unets)
        defaults = sampling_defaults(config)
        if config.cond_drop_prob == 0 or not config.condition_on_text:
            if any(scale != 1 for scale in self.cond_scale or ()) or self.negative_prompt:
                name = "negative_prompt" if self.negative_prompt else "cond_scale"
                raise UserError(
                    f"{commands.flag(name)}: guidance needs a cascade trained with captions and "
                    "cond_drop_prob above 0."
                )
        timesteps, sampler = defaults["timesteps"], self.sampler or defaults["sampler"]
        spacing = self.spacing or defaults["spacing"]
        if sampler == "cascade":
            spacing = self.spacing or own_spacing(config)
            sampler = config.stage(last).process.sampler
            numbers = range(1, count + 1)
            timesteps = tuple(config.sampling_defaults(number).num_steps for number in numbers)
        return dict(
            stop_at_unet_number=last,
            cond_scale=self._per_unet("cond_scale", defaults["cond_scale"], last),
            timesteps=self._per_unet("steps", timesteps, last),
            sampler=sampler,
            spacing=spacing,
            eta=self.eta if sampler == "ddim" else 0.0,
            guidance_interval=self.guidance_interval,
            guidance_schedule=self.guidance_schedule,
            guidance_rescale=self.guidance_rescale,
            lowres_sample_noise_level=self.lowres_sample_noise_level,
        )

    def _per_unet(self, name: str, default: Sequence, last: int) -> tuple:
        """One entry per U-Net of the cascade; those after the last that runs may be left out."""
        given = getattr(self, name)
        if given is None:
            return tuple(default)
        if len(given) not in {1, last, len(default)}:
            runs = "the U-Net that runs" if last == 1 else f"each of the {last} U-Nets that run"
            raise UserError(
                f"{commands.flag(name)} has {len(given)} values: give one, or one for {runs}."
            )
        return (given * len(default) if len(given) == 1 else given + default)[: len(default)]

    def unet_numbers(self, config: ImagenConfig, first: int = 1) -> range:
        """Numbers of the U-Nets that are to run, from `first` on.

        Raises UserError for one without weights, with the command that trains it.
        """
        numbers = range(first, self.last_stage(config) + 1)
        for number in numbers:
            if isinstance(config.unets[number - 1], NullUnetConfig):
                raise UserError(
                    f"U-Net {number} of {self.run} is a NullUnet: this cascade only "
                    "upsamples images and cannot draw them from text."
                )
            if checkpoint.latest_step(self.run, number) is None:
                raise UserError(_untrained(self.run, number, first))
        return numbers


def _untrained(run: epath.Path, number: int, first: int) -> str:
    command = "train.base" if number == 1 else f"train.super_res --unet-number {number}"
    advice = f"train it: python -m {command} --workdir {run}"
    if number > first:
        advice += f"; or stop before it: --stop-at-unet-number {number - 1}"
    return f"U-Net {number} of {run} has no weights; {advice}"


def open_pipeline(
    given: Sampling, say: Callable[[str], None], unet_numbers: Sequence[int] | None = None
) -> Pipeline:
    """The cascade of a run; its weights are read when they are needed.

    Reports which steps are skipped, and where no average is stored. Raises UserError.
    """
    commands.use_precision(given.compute_dtype)
    pipeline = Pipeline.load(
        given.run,
        mesh=given.mesh,
        dtype=given.compute_dtype,
        weights=given.weights,
        t5=given.t5,
        unet_numbers=unet_numbers,
        memory=given.memory,
    )
    for number, read in pipeline.choices.items():
        for note in read.notes:
            say(f"note: {note}")
        if read.weights != given.weights:
            say(
                f"note: {given.run} has no averaged weights (ema) for U-Net {number}: its online "
                "weights are used."
            )
    return pipeline


_seen: set[int] = set()
"""U-Nets with which this process has drawn a step."""


@contextlib.contextmanager
def progress_bars(indices: np.ndarray, count: int) -> Iterator[Progress]:
    """The `progress` of `Imagen.sample` as one bar per stage, with the time left.

    `indices` are those of the batch's images, of `count` in total. Until its first steps are done,
    the bar of a stage that is new to this process says that it is being compiled (or read from the
    cache).
    """
    first, last = indices[0] + 1, indices[-1] + 1
    label = f"image {last} of {count}" if first == last else f"images {first}-{last} of {count}"
    with contextlib.ExitStack() as stack:
        bars: dict[int, tqdm] = {}

        def progress(unet_number: int, done: int, steps: int) -> None:
            if unet_number not in bars:
                bar = tqdm(
                    total=steps,
                    desc=f"{label}, U-Net {unet_number}",
                    unit="step",
                    leave=False,
                    mininterval=commands.bar_interval(),
                )
                bars[unet_number] = stack.enter_context(bar)
                if unet_number not in _seen:
                    bar.set_postfix_str("compiling")
            elif done and unet_number not in _seen:
                _seen.add(unet_number)
                bars[unet_number].set_postfix_str("")
            bars[unet_number].update(done - bars[unet_number].n)
            if done == steps:
                bars[unet_number].refresh()  # the last update may be too soon to be shown

        yield progress
