"""A small text encoder from captions alone: `python -m train.text_encoder --out FOLDER`.

The `demo` encoder has random weights: two captions that mean the same have nothing in common, and a
cascade would have to learn the language from images. Here it is trained on the captions of
`data.scenes`, without an image: two wordings of one content are to have one embedding, and those of
other contents different ones, among them the same words bound in another way ("a red circle above a
blue square", "a blue circle above a red square"). The loss is InfoNCE, in both directions, on the
mean of the tokens (van den Oord et al. 2018, equation 4; Radford et al. 2021, figure 3). What is
held out of the scenes is held out here too.

The folder has the layout of a Hugging Face T5: `--t5 FOLDER` takes it, and transformers reads it.
"""

import dataclasses
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from jaxtyping import Array, Bool, Float, Int
from tqdm import trange

import commands
from imagen_jax import text
from imagen_jax.data import scenes
from imagen_jax.data.scenes import Content, Kind
from imagen_jax.types import AnyArray, Params

TEMPERATURE = 0.07
LENGTH = 20  # tokens of the longest caption, with the end token, and a few more


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Trains a small T5 encoder on the captions of scenes."""

    out: Path
    """Folder to write it to, for --t5."""
    steps: int = 500
    batch_size: int = 128
    """Contents of a step, each in two wordings."""
    lr: float = 1e-3
    seed: int = 0


def main() -> None:
    given = tyro.cli(Settings, prog="python -m train.text_encoder")
    encoder = train(given)
    text.save_encoder(encoder, given.out)
    share = retrieval(encoder)
    print(
        f"{given.out}: the other wording of a held-out combination is the nearest of "
        f"{2 * len(scenes.contents('combinations'))} in {100 * share:.0f} % of cases."
    )


def train(given: Settings) -> text.TextEncoder:
    """The `demo` encoder, trained; a function of the settings."""
    encoder = text.load_encoder("demo")
    optimizer = optax.adam(optax.cosine_decay_schedule(given.lr, given.steps))

    @jax.jit
    def step(params, state, one, two, same):
        value_and_grad = jax.value_and_grad(contrastive_loss)
        loss, grads = value_and_grad(params, encoder.config, one, two, same)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    rng = np.random.default_rng((given.seed, len(scenes.LEVELS)))
    params, state = encoder.params, optimizer.init(encoder.params)
    bar = trange(given.steps, desc="text encoder", unit="step", mininterval=commands.bar_interval())
    for _ in bar:
        contents = draw_contents(given.batch_size, rng)
        numbers = {content: i for i, content in enumerate(contents)}
        label = np.array([numbers[content] for content in contents])
        one, two = (tokens(encoder, contents, rng) for _ in range(2))
        params, state, loss = step(params, state, one, two, label[:, None] == label)
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return text.with_params(encoder, params)


def draw_contents(count: int, rng: np.random.Generator) -> list[Content]:
    """Contents to train on, and beside those of two objects the same words bound in another way."""
    contents: list[Content] = []
    while len(contents) < count:
        content = scenes.training_scene(int(rng.integers(scenes.TRAINING))).content
        contents.append(content)
        if content.relation is not None:
            other = rebound(content, rng)
            contents += [other] * (other.level is None)
    return contents[:count]


def rebound(content: Content, rng: np.random.Generator) -> Content:
    """The two objects in each other's place, or with each other's colour or shape."""
    one, two = content.kind, content.other
    swapped = (
        (two, one),
        (Kind(two.colour, one.shape), Kind(one.colour, two.shape)),
        (Kind(one.colour, two.shape), Kind(two.colour, one.shape)),
    )
    one, two = swapped[rng.integers(len(swapped))]
    return replace(content, kind=one, other=two)


def tokens(
    encoder: text.TextEncoder, contents: list[Content], rng: np.random.Generator
) -> Int[np.ndarray, "b l"]:
    return encoder.tokenize([scenes.caption(content, rng) for content in contents])[:, :LENGTH]


def contrastive_loss(
    params: Params,
    config: text.T5Config,
    one: Int[AnyArray, "b l"],
    two: Int[AnyArray, "b l"],
    same: Bool[AnyArray, "b b"],
) -> Float[Array, ""]:
    """Cross-entropy of which of the other wordings says `same`, in both directions."""
    logits = pooled(params, config, one) @ pooled(params, config, two).T / TEMPERATURE
    right = same / same.sum(1, keepdims=True)
    rows, columns = (jax.nn.log_softmax(x, axis=1) for x in (logits, logits.T))
    return -jnp.mean(jnp.sum(right * (rows + columns), axis=1)) / 2


def pooled(params: Params, config: text.T5Config, ids: Int[AnyArray, "b l"]) -> Float[Array, "b d"]:
    """The mean of the tokens' embeddings, of length 1."""
    embeds, mask = text.encode(params, config, ids)
    mean = embeds.sum(1) / mask.sum(1, keepdims=True)
    return mean / jnp.linalg.norm(mean, axis=-1, keepdims=True)


def retrieval(encoder: text.TextEncoder, seed: int = 0) -> float:
    """Share of the held-out combinations whose other wording is nearest, among the other wordings
    of all of them and of all with their objects exchanged."""
    rng = np.random.default_rng(seed)
    contents = list(scenes.contents("combinations"))
    contents += [replace(one, kind=one.other, other=one.kind) for one in contents]
    one, two = (
        pooled(encoder.params, encoder.config, tokens(encoder, contents, rng)) for _ in range(2)
    )
    return float(jnp.mean(jnp.argmax(one @ two.T, axis=1) == jnp.arange(len(contents))))


if __name__ == "__main__":
    commands.run(main)
