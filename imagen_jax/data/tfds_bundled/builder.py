"""The builder itself. Importing this module registers `imagen_bundled`."""

import io
from collections.abc import Iterator
from typing import Any

import tensorflow_datasets as tfds

from imagen_jax.data.sources import open_source


class ImagenBundled(tfds.core.GeneratorBasedBuilder):
    """Fluent emoji on white, captioned with their English names."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "image": tfds.features.Image(shape=(None, None, 3)),
            "caption": tfds.features.Text(),
        }
        return tfds.core.DatasetInfo(
            builder=self,
            description="1376 Fluent emoji (MIT) on white, captioned with their English names.",
            features=tfds.features.FeaturesDict(features),
        )

    def _split_generators(self, dl_manager: Any) -> dict[str, Iterator]:
        return {split: self._generate_examples(split) for split in ("train", "heldout")}

    def _generate_examples(self, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for record in open_source("bundled", split=split):
            yield record.key, {"image": io.BytesIO(record.image), "caption": record.caption}
