"""Trains imagen-pytorch and this project with the same weights, batches, noise and optimiser.

    python -m benchmarks.paired                  # 100 steps on the CPU, a few minutes
    python -m benchmarks.paired --own-draws 0 1 2 --steps 1500 --inception FILE    # hours

Both start from the weights that imagen-pytorch drew, use the same scenes in the same order, the
same noise levels, noise and dropped captions, and step with Adam at the same learning rate. Prints
the two losses during training, and at the end how far apart the losses and the parameters are; for
the parameters, the distance between the two divided by the distance that ours have moved. Float32
in full precision. Needs what `make test` installs.

With `--own-draws`, each side draws its own noise levels, noise and dropped captions, once for each
of the given seeds, with cosine decay of the learning rate. Both are then measured by the same code,
with the original's weights converted: the loss on held-out scenes, what is drawn right for captions
that were trained on, and the FID of these images against the true ones.
"""

import argparse
import contextlib
import itertools
import json
import platform
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
from tqdm import tqdm

import commands

UNET = dict(
    dim=32,
    cond_dim=64,
    dim_mults=(1, 2, 2),
    layer_attns=(False, False, True),
    layer_cross_attns=(False, True, True),
    attn_heads=4,
    attn_dim_head=32,
    max_text_len=24,
    text_embed_dim=128,
)
SIZE, BATCH, LR, EVERY = 16, 8, 1e-3, 10
HELDOUT, DRAWN = 1024, 300  # scenes whose loss is measured, and that are drawn
SHOWN = 8
UNSEEN = 10**6  # the first batch that is not trained on


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--objective", choices=("noise", "v", "x_start"), default="noise")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights, batches and draws")
    parser.add_argument("--own-draws", type=int, nargs="+", metavar="SEED")
    parser.add_argument("--inception", type=Path, help="weights of the Inception network, for FID")
    parser.add_argument("--pictures", type=Path, help="PNG of what both draw with the last seed")
    parser.add_argument("--out", type=Path, help="write the losses as JSON")
    args = parser.parse_args()
    if args.own_draws:
        for seed in args.own_draws:
            sides = apart_by_draws(args, seed)
            for name, side in sides.items():
                print(f"seed {seed}, {name:>14}: {json.dumps(side.found)}", flush=True)
            if args.pictures:
                write_sheet(args.pictures, {name: side.drawn for name, side in sides.items()})
        return
    ours, theirs = Ours(args.objective), Theirs(args.objective, args.seed)
    start = ours.load(theirs.state())
    losses = []
    print(f"{'step':>6} {'imagen-jax':>12} {'imagen-pytorch':>15} {'relative':>10}")
    for number, batch in enumerate(batches(args.seed, args.steps), 1):
        pair = ours.step(batch), theirs.step(batch)
        losses.append(pair)
        if number % EVERY == 0 or number == 1:
            print(f"{number:6} {pair[0]:12.6f} {pair[1]:15.6f} {apart(pair):10.1e}")
    moved, between = ours.distances(start, theirs.state())
    worst = max(map(apart, losses))
    print(f"losses apart by at most {worst:.1e}; parameters by {between / moved:.1e} of the update")
    if args.out:
        about = vars(args) | {"out": None, "machine": platform.processor()}
        results = {"losses": losses, "worst": worst, "parameters": between / moved}
        args.out.write_text(json.dumps(about | results, indent=1) + "\n")


class Side(NamedTuple):
    """What was measured of one side: numbers, and the scenes that it drew, with their images."""

    found: dict[str, float]
    drawn: Any


def apart_by_draws(args: argparse.Namespace, seed: int) -> dict[str, Side]:
    """Trains both sides, each with its own draws, and measures both."""
    ours = Ours(args.objective, args.steps)
    theirs = Theirs(args.objective, seed, ours.rate)
    ours.load(theirs.state())
    for batch in tqdm(batches(seed, args.steps), f"seed {seed}", args.steps, mininterval=10):
        own = {name: batch[name] for name in ("images", "text_embeds", "text_masks")}
        ours.step(own | {"seed": np.uint32(seed)})
        theirs.step(own)
    sides = {"imagen-jax": ours.measured(args.inception)}
    ours.load(theirs.state())
    return sides | {"imagen-pytorch": ours.measured(args.inception)}


def write_sheet(path: Path, drawn: dict[str, Any]) -> None:
    """True scenes, and what each side drew of their captions from the same noise."""
    from imagen_jax.data import labelled_grid

    chosen = next(iter(drawn.values())).scenes[:SHOWN]
    true, captions = [one.draw(SIZE) for one in chosen], [one.caption for one in chosen]
    rows = [(name, list(one.images[:SHOWN]), []) for name, one in drawn.items()]
    labelled_grid([("true", true, captions), *rows]).save(path)


def apart(pair: tuple[float, float]) -> float:
    """The relative difference of two losses."""
    return abs(pair[0] - pair[1]) / abs(pair[1])


def batches(seed: int, count: int, first: int = 0) -> Iterator[dict[str, np.ndarray]]:
    """Scenes, their embeddings by the demo encoder, and every draw of a step."""
    from imagen_jax import text
    from imagen_jax.data import scenes

    encoder, rng = text.load_encoder("demo"), np.random.default_rng(seed)
    for number in range(first, first + count):
        chosen = [scenes.training_scene(number * BATCH + row) for row in range(BATCH)]
        embeds, masks = encoder([one.caption for one in chosen], length=UNET["max_text_len"])
        yield dict(
            images=np.stack([one.draw(SIZE) for one in chosen]).astype(np.float32) / 255,
            text_embeds=embeds,
            text_masks=masks,
            times=rng.uniform(0, 0.999, BATCH).astype(np.float32),
            noise=rng.standard_normal((BATCH, SIZE, SIZE, 3), np.float32),
            keep_mask=rng.random(BATCH) >= 0.1,
        )


class Ours:
    """This project's loss and optax's Adam."""

    def __init__(self, objective: str, decay_steps: int | None = None):
        import jax
        import optax

        from imagen_jax import ImagenConfig, UnetConfig, nn, training

        jax.config.update("jax_default_matmul_precision", "highest")
        config = ImagenConfig(
            unets=UnetConfig(**UNET),
            image_sizes=SIZE,
            text_encoder_name="demo",
            text_embed_dim=UNET["text_embed_dim"],
            pred_objectives=objective,
        )
        self.rate = (
            optax.cosine_decay_schedule(LR, decay_steps)
            if decay_steps
            else optax.constant_schedule(LR)
        )
        stage, optimizer = config.stage(1), optax.adam(self.rate, b1=0.9, b2=0.99)

        def loss(params, batch):
            names = ("times", "noise", "keep_mask")
            draws = training.Draws(**{k: batch[k] for k in names if k in batch})
            given = {k: batch[k] for k in ("text_embeds", "text_masks")}
            network = nn.bind(stage.network, params)
            losses, _ = training.stage_losses(
                stage, network, batch["images"], draws=draws, key=batch.get("key"), **given
            )
            return losses.mean()

        @jax.jit
        def step(params, state, batch):
            if "seed" in batch:  # its own draws
                key = jax.random.fold_in(jax.random.key(batch["seed"]), state[0].count)
                batch = batch | {"key": key}
            value, grads = jax.value_and_grad(loss)(params, batch)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        self.config, self.target = config, nn.abstract(stage.network)[1]
        self.compiled, self.optimizer, self.loss = step, optimizer, jax.jit(loss)

    def load(self, state_dict: dict[str, np.ndarray]):
        import jax
        import jax.numpy as jnp

        from imagen_jax.interop import keys

        self.params = jax.tree.map(jnp.array, keys.to_jax(state_dict, self.target))
        self.state = self.optimizer.init(self.params)
        return self.params

    def step(self, batch: dict[str, np.ndarray]) -> float:
        self.params, self.state, loss = self.compiled(self.params, self.state, batch)
        return float(loss)

    def distances(self, start, theirs: dict[str, np.ndarray]) -> tuple[float, float]:
        """How far the parameters have moved, and how far they are from the other side's."""
        import jax
        import optax

        from imagen_jax.interop import keys

        other = keys.to_jax(theirs, self.target)
        apart = jax.tree.map(lambda a, b: a - b, self.params, other)
        moved = jax.tree.map(lambda a, b: a - b, self.params, start)
        return float(optax.tree.norm(moved)), float(optax.tree.norm(apart))

    def measured(self, inception: Path | None) -> Side:
        """The loss of held-out scenes, the shares of trained captions drawn right, and the FID."""
        import imagen_jax
        from evaluate import composition, report, score
        from imagen_jax import nn

        held = batches(0, HELDOUT // BATCH, first=UNSEEN)
        found = {"loss": float(np.mean([self.loss(self.params, batch) for batch in held]))}
        with tempfile.TemporaryDirectory() as run, contextlib.redirect_stdout(None):
            unet = nn.bind(self.config.unets[0], self.params)
            imagen_jax.save(run, imagen_jax.Imagen(self.config, unets=[unet]), step=1)
            given = composition.Settings(
                checkpoint=Path(run), levels=("seen",), num_images=DRAWN, weights="online"
            )
            drawn = composition.measure(given)
        shares = drawn["seen"].summary
        found |= {name: shares[name].share for name in ("relation", "count", "attributes")}
        if inception is not None:
            found["fid"] = report.distance(drawn, score.compiled(inception))
        return Side({name: round(value, 4) for name, value in found.items()}, drawn["seen"])


class Theirs:
    """imagen-pytorch's loss and torch's Adam."""

    def __init__(self, objective: str, seed: int, rate=lambda step: LR):
        from imagen_jax.interop.reference import import_imagen_pytorch

        original = import_imagen_pytorch()
        import torch

        torch.manual_seed(seed)
        self.torch, self.module = torch, original.imagen_pytorch
        self.imagen = original.Imagen(
            original.Unet(**UNET),
            image_sizes=SIZE,
            text_embed_dim=UNET["text_embed_dim"],
            pred_objectives=objective,
        )
        self.adam = torch.optim.Adam(self.imagen.parameters(), LR, betas=(0.9, 0.99))
        self.rates = map(rate, itertools.count())

    def state(self) -> dict[str, np.ndarray]:
        return {name: x.numpy().copy() for name, x in self.imagen.unets[0].state_dict().items()}

    def step(self, batch: dict[str, np.ndarray]) -> float:
        given = {name: self.torch.tensor(value) for name, value in batch.items()}
        with contextlib.ExitStack() as stack:
            for target, name, value in self._draws(given):
                stack.enter_context(mock.patch.object(target, name, lambda *_, v=value, **__: v))
            loss = self.imagen(
                given["images"].permute(0, 3, 1, 2),
                text_embeds=given["text_embeds"],
                text_masks=given["text_masks"],
                unet_number=1,
            )
        self.adam.zero_grad()
        loss.backward()
        for group in self.adam.param_groups:
            group["lr"] = float(next(self.rates))
        self.adam.step()
        return float(loss.detach())

    def _draws(self, given: dict) -> Iterator[tuple]:
        """What is drawn elsewhere: the module, the name of what draws it there, and the draw."""
        if "noise" in given:
            yield self.module, "prob_mask_like", given["keep_mask"]
            yield self.imagen.noise_schedulers[0], "sample_random_times", given["times"]
            yield self.torch, "randn_like", given["noise"].permute(0, 3, 1, 2)


if __name__ == "__main__":
    commands.run(main)
