"""What a run says of itself before it begins."""

import math

import jax

from imagen_jax import nn
from imagen_jax.config import ImagenConfig
from imagen_jax.stage import show
from train.feed import Feed
from train.settings import Settings


def announce(config: ImagenConfig, unet_number: int, settings: Settings, feed: Feed) -> None:
    """Prints what is about to be trained, on what, where and how."""
    stage = config.stage(unet_number)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(nn.abstract(stage.network)[1]))
    size = f"{show(stage.size)} pixels"
    if stage.lowres is not None:
        size = f"{show(stage.lowres.size)} -> {size}"
        if getattr(stage.process, "objective", None) == "noise" and stage.network.memory_efficient:
            print(
                "note: memory-efficient super-resolution drifts in colour when it predicts noise; "
                "pred_objectives 'v' does not."
            )
    print(f"U-Net {unet_number} of {len(config.unets)}: {size}, {count:,} parameters")
    print(f"data: {len(feed.train)} pictures of {settings.data}, {len(feed.heldout)} held out")
    if feed.encoder is not None and feed.encoder.is_demo:
        print(
            "text: the demo encoder, a small T5 with random frozen weights: it tells captions "
            "apart and knows no language. --t5 google/t5-v1_1-base uses a real one."
        )
    print(f"devices: {feed.layout.describe()}")
    print(f"run: {settings.run} (configuration in config.json)")
    print(settings.describe())
