"""Converts weights to and from imagen-pytorch, DeepFloyd IF (diffusers) and safetensors.

    python -m imagen_jax.interop from-torch imagen.pt runs/imagen --verify
    python -m imagen_jax.interop to-torch runs/imagen imagen.pt --verify
    python -m imagen_jax.interop inspect imagen.pt
    python -m imagen_jax.interop from-diffusers IF-I-XL-v1.0 IF-II-L-v1.0 runs/if

A run directory made this way works like any other: sample from it with `python -m
sample.text_to_image --checkpoint DIR`, and train it further with `python -m train.base --init-from
DIR --workdir NEW`.
"""

import dataclasses
import functools
import operator
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tyro.conf import Positional, arg, subcommand

from imagen_jax import checkpoint, run_config
from imagen_jax.checkpoint import Weights
from imagen_jax.errors import UserError, flags, run
from imagen_jax.if_config import IF_TEXT_LENGTH
from imagen_jax.interop import (
    deepfloyd,
    imagen_pytorch,
    inspect,
    safetensors_file,
    verify,
    verify_if,
)
from imagen_jax.interop.imagen_pytorch import Checkpoint
from imagen_jax.interop.run_dir import RunDir
from imagen_jax.interop.target import replacing
from imagen_jax.types import Params


@dataclasses.dataclass(frozen=True)
class FromTorch:
    """Converts an imagen-pytorch file (1.22 to 2.1) to a run directory."""

    checkpoint: Annotated[Positional[Path], arg(metavar="CKPT.pt")]
    """File from ImagenTrainer.save, torch.save(imagen.state_dict()) or Unet.persist_to_file."""
    out: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The run directory to write."""
    weights: Weights | None = None
    """Keep only the averaged (ema) or the online weights. Default: both if the file has both;
    commands that load the directory use the average."""
    config: Path | None = None
    """JSON for a file without a configuration: the CLI's imagen_config.json, or only the fields
    that cannot be inferred from the tensors (the error message lists them)."""
    verify: bool = False
    """Verify the result before it is put in place: see `verify`."""
    overwrite: bool = False
    """Replace an existing run directory."""

    def run(self) -> None:
        source = imagen_pytorch.read(self.checkpoint, self.config)
        kept: list[Weights] = [self.weights] if self.weights else source.held
        numbers = range(1, len(source.config.unets) + 1)
        trees: dict[Weights, list[Params]] = {which: source.trees(which) for which in kept}
        with replacing(self.out, overwrite=self.overwrite, sources=[self.checkpoint]) as partial:
            checkpoint.write(
                partial,
                source.config,
                {n: {which: trees[which][n - 1] for which in kept} for n in numbers},
                dict(zip(numbers, source.origin["steps"], strict=True)),
                source.origin,
            )
            if self.verify:
                prove(source, RunDir.open(partial), kept)
        print(f"{self.out}: {inspect.summary(source.config)}, weights {' and '.join(kept)}")
        for note in source.notes:
            print(f"note: {note}")
        if source.config.elucidated is not None and len(source.config.unets) > 1:
            print(
                "note: imagen-pytorch samples elucidated super-resolution with the wrong "
                "conditioning of the low-resolution noise. Here it is right; to reproduce its "
                'images, set "lowres_conditioning": "time" under "elucidated" in config.json.'
            )


@dataclasses.dataclass(frozen=True)
class ToTorch:
    """Converts a run directory to a file that imagen-pytorch 2.1.0 loads."""

    checkpoint: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """A run directory: what training calls --workdir."""
    out: Annotated[Positional[Path], arg(metavar="OUT.pt")]
    """The file to write, for `imagen_pytorch.load_imagen_from_checkpoint` and
    `ImagenTrainer.load`."""
    weights: Literal["ema", "online", "both"] = "both"
    """Which weights to write; `ema` or `online` is used both as the model and as its average. If
    the run has only one of them, that one is used."""
    verify: bool = False
    """Read the file back and verify it before it is put in place: see `verify`."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        run = opened(self.checkpoint)
        kept = chosen(run, self.weights)
        with replacing(self.out, overwrite=self.overwrite, sources=[self.checkpoint]) as partial:
            write_torch(partial, run, kept)
            if self.verify:
                source = imagen_pytorch.read(partial)
                for which in kept:
                    prove(source, run, [which])
        print(f"{self.out}: {inspect.summary(run.config)}, weights {' and '.join(kept)}")
        print("note: the optimiser's state is not converted: training starts with a fresh one.")
        if any(getattr(unet, "norm", "rms") == "group" for unet in run.config.unets):
            print(
                "note: these networks have the GroupNorm of imagen-pytorch 1.22 to 1.26; 2.x "
                "loads them only in part, without an error. Load the file with 1.26."
            )


@dataclasses.dataclass(frozen=True)
class ToSafetensors:
    """Converts a run directory to one safetensors file, with its configuration; needs no torch."""

    checkpoint: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """A run directory."""
    out: Annotated[Positional[Path], arg(metavar="OUT.safetensors")]
    """The file to write."""
    weights: Weights = "ema"
    """The averaged weights (or the online ones, with a note, if there are none) or the online."""
    overwrite: bool = False
    """Replace an existing file."""

    def run(self) -> None:
        run = opened(self.checkpoint)
        which = chosen(run, self.weights)[0]
        params = {number: run.params(number, which) for number in run.steps}
        with replacing(self.out, overwrite=self.overwrite, sources=[self.checkpoint]) as partial:
            contents = safetensors_file.Contents(
                config=run.config,
                params=params,
                steps=run.steps,
                weights=which,
                origin=run.origin,
                text_encoder=run_config.read_text_encoder(run.path),
            )
            safetensors_file.write(partial, contents)
        print(f"{self.out}: {inspect.summary(run.config)}, weights {which}")


@dataclasses.dataclass(frozen=True)
class FromSafetensors:
    """Converts a file written by to-safetensors to a run directory; needs no torch."""

    file: Annotated[Positional[Path], arg(metavar="FILE.safetensors")]
    """The safetensors file."""
    out: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The run directory to write."""
    overwrite: bool = False
    """Replace an existing run directory."""

    def run(self) -> None:
        contents = safetensors_file.read(self.file)
        for number, params in contents.params.items():
            checkpoint.check_finite(params, f"{self.file}, U-Net {number}")
        trees = {n: {contents.weights: params} for n, params in contents.params.items()}
        with replacing(self.out, overwrite=self.overwrite, sources=[self.file]) as partial:
            checkpoint.write(
                partial,
                contents.config,
                trees,
                contents.steps,
                contents.origin,
                contents.text_encoder,
            )
        print(f"{self.out}: {inspect.summary(contents.config)}, weights {contents.weights}")


@dataclasses.dataclass(frozen=True)
class FromDiffusers:
    """Converts folders of DeepFloyd IF (diffusers' layout or the original) to a run directory: its
    base, its super-resolution stage, or both as one cascade."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR [DIR ...] OUT_DIR")]
    """The stages, from small to large, followed by the run directory to write."""
    variant: deepfloyd.Variant | None = None
    """Read files of another dtype, such as `--variant fp16`."""
    verify: bool = False
    """Compare each network with diffusers' on the same inputs before the result is put in place:
    see `verify-if`."""
    overwrite: bool = False
    """Replace an existing run directory."""

    def run(self) -> None:
        if len(self.folders) < 2:
            raise UserError("from-diffusers needs a folder to read and a directory to write.")
        *sources, out = self.folders
        stages = [deepfloyd.read(folder, self.variant) for folder in sources]
        config = deepfloyd.cascade(stages)
        first = 1 + len(config.unets) - len(stages)
        trees = {n: {"ema": stage.params} for n, stage in enumerate(stages, first)}
        with replacing(out, overwrite=self.overwrite, sources=sources) as partial:
            checkpoint.write(partial, config, trees, dict.fromkeys(trees, 0))
            if self.verify:
                for source in sources:
                    print(verify_if.prove(source, self.variant))
        print(f"{out}: {inspect.summary(config)}")
        print(deepfloyd.LICENCE)


@dataclasses.dataclass(frozen=True)
class ToDiffusers:
    """Converts a DeepFloyd IF U-Net in a run directory to a folder that diffusers loads."""

    checkpoint: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """A run directory."""
    out: Annotated[Positional[Path], arg(metavar="OUT_DIR")]
    """The folder to write, for `IFPipeline.from_pretrained` and `IFSuperResolutionPipeline`, which
    also need a text encoder or embeddings."""
    unet_number: int = 1
    """Which U-Net."""
    weights: Weights = "ema"
    """The averaged weights (or the online ones, with a note, if there are none) or the online."""
    variant: deepfloyd.Variant | None = None
    """Write this dtype, to files that from_pretrained selects by `variant=`. Default: float32."""
    overwrite: bool = False
    """Replace an existing folder."""

    def run(self) -> None:
        run = opened(self.checkpoint)
        which = chosen(run, self.weights)[0]
        if not 1 <= self.unet_number <= len(run.config.unets):
            raise UserError(
                f"--unet-number {self.unet_number} is not in 1 .. {len(run.config.unets)}."
            )
        unet = run.config.unets[self.unet_number - 1]
        with replacing(self.out, overwrite=self.overwrite, sources=[self.checkpoint]) as partial:
            deepfloyd.write(partial, run, self.unet_number, which, self.variant)
        print(f"{self.out}: U-Net {self.unet_number}, weights {which}")
        if unet.max_text_len != IF_TEXT_LENGTH:
            print(
                f"note: this U-Net reads {unet.max_text_len} tokens, including padding; diffusers' "
                f"pipelines encode {IF_TEXT_LENGTH}. Give them embeddings of {unet.max_text_len}."
            )
        if unet.null_text != "encoded":
            print(
                "note: this U-Net's guidance steers away from missing text; diffusers' pipelines "
                "steer away from the empty caption, on which it was never trained. Use a guidance "
                "scale of 1 there, or sample it here."
            )
        print(deepfloyd.LICENCE)


@dataclasses.dataclass(frozen=True)
class VerifyIf:
    """For people with access to DeepFloyd IF's weights: compares each network's output with
    diffusers' on the same noise, steps and text, with the weights in the folder, in float32. Needs
    torch and diffusers. With --t5 it also draws a picture."""

    folders: Annotated[Positional[tuple[Path, ...]], arg(metavar="DIR [DIR ...]")]
    """The stages' folders, in diffusers' layout."""
    variant: deepfloyd.Variant | None = None
    """Read files of another dtype, such as `--variant fp16`."""
    t5: str | None = None
    """Folder of T5-v1.1-XXL, such as IF-I's text_encoder: also draw a picture with the stages."""
    prompt: str = "a red cube on top of a blue sphere"
    """What the picture shows."""
    out: Path = Path("verify-if.png")
    """File to write the picture to."""

    def run(self) -> None:
        if not self.folders:
            raise UserError("verify-if needs a folder.")
        for folder in self.folders:
            print(verify_if.prove(folder, self.variant))
        if self.t5 is not None:
            stages = [deepfloyd.read(folder, self.variant) for folder in self.folders]
            if stages[0].unet.lowres_cond:
                raise UserError(
                    f"--t5: {self.folders[0]} upsamples images; to draw one, give IF-I before it."
                )
            picture = verify_if.draw(stages, self.t5, self.prompt)
            picture.save(self.out)
            print(f"{self.out}: {self.prompt}")


@dataclasses.dataclass(frozen=True)
class Inspect:
    """What a file or a run directory holds: networks, sizes, dtypes, steps, configuration."""

    path: Annotated[Positional[Path], arg(metavar="FILE_OR_DIR")]
    """A file of imagen-pytorch, a safetensors file or a run directory."""
    config: Path | None = None
    """JSON for a file without configuration, as for from-torch."""

    def run(self) -> None:
        print(inspect.describe(self.path, self.config))


@dataclasses.dataclass(frozen=True)
class Verify:
    """Verifies that a run directory has the weights of an imagen-pytorch file: (a) converting back
    gives every tensor again, bit for bit; (b) every stage gives the same output in both frameworks,
    with text and without, to 1e-4. (b) needs imagen-pytorch."""

    checkpoint: Annotated[Positional[Path], arg(metavar="CKPT.pt")]
    """The file of imagen-pytorch."""
    run_dir: Annotated[Positional[Path], arg(metavar="RUN_DIR")]
    """The run directory."""
    config: Path | None = None
    """JSON for a file without configuration, as for from-torch."""

    def run(self) -> None:
        source, run = imagen_pytorch.read(self.checkpoint, self.config), opened(self.run_dir)
        kept = [which for which in source.held if all(run.has(n, which) for n in run.steps)]
        if not kept or not run.steps:
            raise UserError(f"{self.run_dir} contains none of the weights of {self.checkpoint}.")
        prove(source, run, kept)


def opened(path: Path) -> RunDir:
    """A run directory; prints which steps are passed over."""
    run = RunDir.open(path)
    for note in run.notes:
        print(f"note: {note}")
    return run


def chosen(run: RunDir, weights: Literal["ema", "online", "both"]) -> list[Weights]:
    """The requested weights that a run has, at least one kind. Raises ValueError if a U-Net has no
    weights at all."""
    for number, unet in enumerate(run.config.unets, 1):
        if number not in run.steps and not hasattr(unet, "is_null"):
            raise UserError(f"{run.path} has no weights of U-Net {number}: train it first.")
    has: list[Weights] = [
        which for which in ("ema", "online") if all(run.has(n, which) for n in run.steps)
    ]
    found = [which for which in has if weights in (which, "both")] or has
    if not found:
        raise UserError(f"{run.path}: some U-Nets have only averaged weights, others only online.")
    if weights not in ("both", *found):
        print(f"note: {run.path} has no {weights} weights: the {found[0]} ones are used.")
    return found


def prove(source: Checkpoint, run: RunDir, kept: list[Weights]) -> None:
    """Prints what was compared, as it goes."""
    for line in verify.prove(source, run, kept):
        print(line)


def write_torch(path: Path, run: RunDir, kept: list[Weights]) -> None:
    """The weights of a run as a trainer's file; if only one set is kept, it is used for both."""
    numbers = range(1, len(run.config.unets) + 1)
    model = "online" if "online" in kept else "ema"
    online = [run.params_or_null(number, model) for number in numbers]
    ema = None
    if set(kept) == {"ema", "online"}:
        ema = [run.params_or_null(number, "ema") for number in numbers]
    origin = dict(run.origin or {})
    origin["steps"] = [run.steps.get(number, 0) for number in numbers]
    imagen_pytorch.write(path, run.config, online, ema, origin)


COMMANDS = {
    "from-torch": FromTorch,
    "to-torch": ToTorch,
    "to-safetensors": ToSafetensors,
    "from-safetensors": FromSafetensors,
    "from-diffusers": FromDiffusers,
    "to-diffusers": ToDiffusers,
    "verify-if": VerifyIf,
    "inspect": Inspect,
    "verify": Verify,
}


def main() -> None:
    kinds = {flags(kind): kind for kind in COMMANDS.values()}
    choices = [
        Annotated[form, subcommand(name)] for name, form in zip(COMMANDS, kinds, strict=True)
    ]
    config = (tyro.conf.FlagCreatePairsOff, tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone)
    found = tyro.cli(
        functools.reduce(operator.or_, choices),
        prog="python -m imagen_jax.interop",
        description=__doc__,
        config=config,
    )
    kinds[type(found)](**vars(found)).run()


if __name__ == "__main__":
    run(main)
