"""Prepare the bundled pictures as array_record: `python -m imagen_jax.data.tfds_bundled`."""

from dataclasses import dataclass
from pathlib import Path

import tyro

from imagen_jax.data.tfds_bundled.builder import ImagenBundled


@dataclass(frozen=True)
class Arguments:
    """Prepare the bundled pictures for `--data tfds:imagen_bundled`."""

    data_dir: Path | None = None  # default: tensorflow-datasets' own


def main(arguments: Arguments) -> None:
    """Write the set unless it is there, and say where."""
    builder = ImagenBundled(data_dir=arguments.data_dir, file_format="array_record")
    builder.download_and_prepare()
    print(f"tfds:imagen_bundled is in {builder.data_dir}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
