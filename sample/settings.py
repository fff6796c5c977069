"""The settings of the commands that draw images: how to sample, and what is written."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from commands.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(Sampling):
    """Samples from a trained cascade."""

    out: Path | None = None
    """Folder to write to; existing files are not overwritten. Default: samples/COMMAND in the run
    directory."""
    format: Literal["png", "jpeg", "webp"] = "png"
    """Image file format. JPEG is lossy, the others are not."""
    json: bool = False
    """Prints one line of JSON an image, with its file and its recipe, and nothing else on standard
    output."""
    metadata: bool = True
    """Stores in each file how to draw it again: prompt, seed, settings, checkpoint."""
    save_stages: bool = False
    """Also writes the smaller images that the earlier U-Nets drew."""
    safety_checker: Path | None = None
    """ONNX classifier: images that it finds unsafe are written as plain grey. See docs/hooks.md."""
    safety_threshold: float = 0.5
    """Images with at least this probability are unsafe. Open NSFW's authors call those below 0.2
    safe and those above 0.8 unsafe."""
    c2pa: Annotated[tuple[Path, Path] | None, tyro.conf.arg(metavar="CERT KEY")] = None
    """Signs the files with a certificate chain and its private key (PEM). They then state, by the
    C2PA standard, that a model made them. See docs/hooks.md."""

    def say(self, line: str) -> None:
        """Prints to standard output, or to standard error with --json."""
        print(line, file=sys.stderr if self.json else sys.stdout, flush=True)

    @property
    def fractions(self) -> tuple[str, ...]:
        return (*super().fractions, "safety_threshold")
