"""imagen-pytorch and this project, trained on the same: weights, batches, noise, optimiser.

    python -m benchmarks.paired                  # 100 steps on the CPU, a few minutes

Both start from the weights that imagen-pytorch drew, take the same scenes in the same order, are
given the same noise levels, noise and dropped captions, and step with Adam at one rate. Prints the
two losses as they go, and at the end how far the losses and the parameters are apart: of the
parameters the distance between the two, over the distance that ours have moved. Float32 in full
precision. Needs what `make test` installs.
"""

import argparse
import json
import platform
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import numpy as np

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--objective", choices=("noise", "v", "x_start"), default="noise")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and draws")
    parser.add_argument("--out", type=Path, help="write the losses as JSON")
    args = parser.parse_args()
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


def apart(pair: tuple[float, float]) -> float:
    """The relative difference of two losses."""
    return abs(pair[0] - pair[1]) / abs(pair[1])


def batches(seed: int, count: int) -> Iterator[dict[str, np.ndarray]]:
    """Scenes, their embeddings by the demo encoder, and every draw of a step."""
    from imagen_jax import text
    from imagen_jax.data import scenes

    encoder, rng = text.load_encoder("demo"), np.random.default_rng(seed)
    for number in range(count):
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

    def __init__(self, objective: str):
        import jax
        import optax

        from imagen_jax import ImagenConfig, UnetConfig, nn, training

        jax.config.update("jax_default_matmul_precision", "highest")
        config = ImagenConfig(
            unets=UnetConfig(**UNET),
            image_sizes=SIZE,
            text_embed_dim=UNET["text_embed_dim"],
            pred_objectives=objective,
        )
        stage, optimizer = config.stage(1), optax.adam(LR, b1=0.9, b2=0.99)

        @jax.jit
        def step(params, state, batch):
            def loss(params):
                draws = training.Draws(**{k: batch[k] for k in ("times", "noise", "keep_mask")})
                given = {k: batch[k] for k in ("text_embeds", "text_masks")}
                network = nn.bind(stage.network, params)
                losses, _ = training.stage_losses(
                    stage, network, batch["images"], draws=draws, **given
                )
                return losses.mean()

            value, grads = jax.value_and_grad(loss)(params)
            updates, state = optimizer.update(grads, state)
            return optax.apply_updates(params, updates), state, value

        self.target = nn.abstract(stage.network)[1]
        self.compiled, self.optimizer = step, optimizer

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


class Theirs:
    """imagen-pytorch's loss and torch's Adam."""

    def __init__(self, objective: str, seed: int):
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

    def state(self) -> dict[str, np.ndarray]:
        return {name: x.numpy().copy() for name, x in self.imagen.unets[0].state_dict().items()}

    def step(self, batch: dict[str, np.ndarray]) -> float:
        given = {name: self.torch.tensor(value) for name, value in batch.items()}
        nchw = {name: given[name].permute(0, 3, 1, 2) for name in ("images", "noise")}
        patch = mock.patch.object
        with (
            patch(self.module, "prob_mask_like", lambda *_, **__: given["keep_mask"]),
            patch(
                self.imagen.noise_schedulers[0],
                "sample_random_times",
                lambda *_, **__: given["times"],
            ),
            patch(self.torch, "randn_like", lambda *_, **__: nchw["noise"]),
        ):
            loss = self.imagen(
                nchw["images"],
                text_embeds=given["text_embeds"],
                text_masks=given["text_masks"],
                unet_number=1,
            )
        self.adam.zero_grad()
        loss.backward()
        self.adam.step()
        return float(loss.detach())


if __name__ == "__main__":
    commands.run(main)
