"""Trains a small text encoder on captions only: `python -m train.text_encoder --out FOLDER`.

The `demo` encoder has random weights. It tells captions apart, but nothing simple can read from its
embeddings which colour belongs to which object: a linear map finds the colour of the first object
of "a red circle above a blue square" in 63 % of captions, where chance is half. A cascade would
have to learn the grammar from images, at a hundred times the cost.

Here the encoder learns it from captions of `data.scenes`, without images. For each property that a
caption can state (colour, shape and size of either object, their relation, number and place; for
each colour, the shape that has it, where that is and how large), a linear read-out of the mean of
the tokens is trained together with the encoder to predict it, and discarded afterwards. The
properties of each colour are what a network needs where it sees that colour: a base binds 70 % of
relations with them and 61 % without (docs/quality.md). Two wordings of the same content have the
same properties. What is held out of the scenes is held out here too.

The folder has the layout of a Hugging Face T5: `--t5 FOLDER` and transformers can both load it.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Bool, Float, Int
from tqdm import trange

import commands
from imagen_jax import text
from imagen_jax.data import scene_source, scenes
from imagen_jax.data.scenes import Content
from imagen_jax.errors import UserError, parse
from imagen_jax.types import AnyArray, Params

LENGTH = 16  # tokens of the longest caption, with the end token, and one more
SIZES = (None, "small", "large")
ROLES = (None, "alone", *(f"{one} {r}" for r in scenes.RELATIONS for one in ("first", "other")))
SAID = {
    "colour": tuple(scenes.COLOURS),
    "shape": scenes.SHAPES,
    "size": SIZES,
    "count": tuple(scenes.NUMBERS),
    "place": (None, *scenes.PLACES),
    "relation": (None, *scenes.RELATIONS),
    "other_colour": (None, *scenes.COLOURS),
    "other_shape": (None, *scenes.SHAPES),
    "other_size": SIZES,
    **{f"shape of {colour}": (None, *scenes.SHAPES) for colour in scenes.COLOURS},
    **{f"size of {colour}": SIZES for colour in scenes.COLOURS},
    **{f"role of {colour}": ROLES for colour in scenes.COLOURS},
}
"""What a caption can state, and the possible answers."""
WEIGHT_DECAY = 0.3
"""Keeps a word's meaning independent of its neighbours: without it, pairs of words are learned."""
SIZED = 0.7  # the share of captions of two objects that name a size

Reading = dict[str, Float[Array, "d _"]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Trains a small T5 encoder on the captions of scenes."""

    out: Path
    """Folder to write it to, for --t5."""
    overwrite: bool = False
    """Replace an existing encoder. Cascades trained with the old one will refuse the new one."""
    steps: int = 1500
    """Training steps."""
    batch_size: int = 64
    """Captions per step."""
    lr: float = 2e-3
    """Peak learning rate, with cosine decay."""
    seed: int = 0
    """Random seed for the order of the captions and the read-outs."""

    def __post_init__(self):
        for name in ("steps", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{commands.flag(name)} {getattr(self, name)}: must be at least 1.")


def main() -> None:
    given = parse(Settings, prog="python -m train.text_encoder", description=__doc__)
    if (given.out / "config.json").exists() and not given.overwrite:
        raise UserError(
            f"{given.out} contains an encoder: choose another --out, or --overwrite it."
        )
    encoder, reading = train(given)
    text.save_encoder(encoder, given.out)
    share = accuracy(encoder, reading, scenes.contents("combinations"))
    print(f"{given.out}: {100 * share:.0f} % of held-out combinations are read completely right.")


def train(given: Settings) -> tuple[text.TextEncoder, Reading]:
    """The trained `demo` encoder and its read-outs; a function of the settings."""
    encoder = text.load_encoder("demo")
    rng = np.random.default_rng((given.seed, len(scenes.LEVELS)))
    reading = {
        name: jnp.asarray(0.1 * rng.normal(size=(encoder.width, len(answers))), jnp.float32)
        for name, answers in SAID.items()
    }
    schedule = optax.cosine_decay_schedule(given.lr, given.steps)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)

    @jax.jit
    def step(weights, state, ids, answers):
        loss, grads = jax.value_and_grad(reading_loss)(weights, encoder.config, ids, answers)
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state, loss

    weights = encoder.params, reading
    state = optimizer.init(weights)
    bar = trange(given.steps, desc="text encoder", unit="step", mininterval=commands.bar_interval())
    for _ in bar:
        contents = [
            scenes.training_content(int(seed), SIZED)
            for seed in rng.integers(scene_source.TRAINING, size=given.batch_size)
        ]
        ids = tokens(encoder, contents, rng)
        weights, state, loss = step(weights, state, ids, answers_of(contents))
        bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
    return text.with_params(encoder, weights[0]), weights[1]


def tokens(
    encoder: text.TextEncoder, contents: list[Content], rng: np.random.Generator
) -> Int[np.ndarray, "b l"]:
    """One wording of each content."""
    return encoder.tokenize([scenes.caption(content, rng) for content in contents])[:, :LENGTH]


def answers_of(contents: list[Content]) -> dict[str, Int[np.ndarray, "b"]]:
    """What the captions say, as indices into the answers in SAID."""

    def said(content: Content) -> dict:
        kind, other, relation = content.kind, content.other, content.relation
        answers = dict.fromkeys(SAID) | vars(content) | kind._asdict()
        answers[f"shape of {kind.colour}"] = kind.shape
        answers[f"size of {kind.colour}"] = content.size
        answers[f"role of {kind.colour}"] = f"first {relation}" if relation else "alone"
        if other is not None:
            answers |= {"other_colour": other.colour, "other_shape": other.shape}
            answers[f"shape of {other.colour}"] = other.shape
            answers[f"size of {other.colour}"] = content.other_size
            answers[f"role of {other.colour}"] = f"other {relation}"
        return answers

    every = [said(content) for content in contents]
    return {
        name: np.array([answers.index(one[name]) for one in every])
        for name, answers in SAID.items()
    }


def read(
    weights: tuple[Params, Reading], config: text.T5Config, ids: Int[AnyArray, "b l"]
) -> dict[str, Float[Array, "b _"]]:
    """Logits of the answers, from the mean of the tokens' embeddings."""
    embeds, mask = text.encode(weights[0], config, ids)
    mean = embeds.sum(1) / mask.sum(1, keepdims=True)
    return {name: mean @ matrix for name, matrix in weights[1].items()}


def reading_loss(
    weights: tuple[Params, Reading],
    config: text.T5Config,
    ids: Int[AnyArray, "b l"],
    answers: dict[str, Int[AnyArray, "b"]],
) -> Float[Array, ""]:
    """The mean cross-entropy of each property in SAID, summed over the properties."""
    logits = read(weights, config, ids)
    losses = [
        optax.losses.softmax_cross_entropy_with_integer_labels(logits[name], answers[name])
        for name in logits
    ]
    return jnp.sum(jnp.mean(jnp.stack(losses), axis=1))


def accuracy(
    encoder: text.TextEncoder, reading: Reading, contents: tuple[Content, ...], seed: int = 0
) -> float:
    """The share of the contents that are read completely right, from one wording of each."""
    contents = list(contents)
    ids = tokens(encoder, contents, np.random.default_rng(seed))
    logits, answers = read((encoder.params, reading), encoder.config, ids), answers_of(contents)
    right: list[Bool[np.ndarray, b]] = [
        np.asarray(logits[name]).argmax(1) == answers[name] for name in logits
    ]
    return float(np.all(right, axis=0).mean())


if __name__ == "__main__":
    commands.run(main)
