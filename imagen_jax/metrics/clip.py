"""CLIP (Radford et al. 2021): how well an image fits a text.

    clip = load_clip(folder)                       # a Hugging Face folder, such as ViT-L/14's
    images, texts = clip.embed_images(images), clip.embed_texts(captions)       # unit norm
    score(images, texts)                           # CLIP score, for each pair
    r_precision(images, texts)                     # is an image's own text the nearest of all?

Two transformers, of patches and of tokens, whose last states are projected into one space. Modules
and parameters have the names of transformers' `CLIPModel`, so that weights load by name.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, traverse_util
from jaxtyping import Array, Float, Int, UInt8
from PIL import Image
from tokenizers import Tokenizer

from imagen_jax.errors import UserError
from imagen_jax.streams import ParamKeys
from imagen_jax.text import loading
from imagen_jax.types import AnyArray, Params

MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
ACTIVATIONS = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
}

Tokens = Float[Array, "b l d"]
Pixels = UInt8[np.ndarray, "_ _ 3"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerConfig:
    """Fields of `text_config` or `vision_config` in a folder's config.json; defaults as there."""

    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    layer_norm_eps: float = 1e-5
    hidden_act: str = "quick_gelu"
    vocab_size: int = 49408
    max_position_embeddings: int = 77
    eos_token_id: int = 49407
    image_size: int = 224
    patch_size: int = 32
    num_channels: int = 3

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], **defaults: Any) -> "TowerConfig":
        names = {field.name for field in dataclasses.fields(cls)}
        config = cls(**defaults | {name: data[name] for name in names & data.keys()})
        if config.hidden_act not in ACTIVATIONS:
            raise UserError(f"hidden_act = {config.hidden_act!r}: not one of {list(ACTIVATIONS)}.")
        return config


class Attention(nnx.Module):
    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        linear = functools.partial(nnx.Linear, *[config.hidden_size] * 2, rngs=rngs)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (linear() for _ in range(4))
        self.heads = config.num_attention_heads

    def __call__(self, x: Tokens, mask: Array | None) -> Tokens:
        q, k, v = (
            project(x).reshape(*x.shape[:2], self.heads, -1)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out = jax.nn.dot_product_attention(q, k, v, mask=mask)
        return self.out_proj(out.reshape(x.shape))


class Mlp(nnx.Module):
    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        self.fc1 = nnx.Linear(config.hidden_size, config.intermediate_size, rngs=rngs)
        self.fc2 = nnx.Linear(config.intermediate_size, config.hidden_size, rngs=rngs)
        self.activation = ACTIVATIONS[config.hidden_act]

    def __call__(self, x: Tokens) -> Tokens:
        return self.fc2(self.activation(self.fc1(x)))


class Layer(nnx.Module):
    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        self.layer_norm1, self.layer_norm2 = (_norm(config, rngs) for _ in range(2))
        self.self_attn, self.mlp = Attention(config, rngs=rngs), Mlp(config, rngs=rngs)

    def __call__(self, x: Tokens, mask: Array | None) -> Tokens:
        x = x + self.self_attn(self.layer_norm1(x), mask)
        return x + self.mlp(self.layer_norm2(x))


class Encoder(nnx.Module):
    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        count = config.num_hidden_layers
        self.layers = nnx.List(Layer(config, rngs=rngs) for _ in range(count))

    def __call__(self, x: Tokens, mask: Array | None = None) -> Tokens:
        for layer in self.layers:
            x = layer(x, mask)
        return x


class TextEmbeddings(nnx.Module):
    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        embed = functools.partial(nnx.Embed, features=config.hidden_size, rngs=rngs)
        self.token_embedding = embed(config.vocab_size)
        self.position_embedding = embed(config.max_position_embeddings)

    def __call__(self, ids: Int[Array, "b l"]) -> Tokens:
        return self.token_embedding(ids) + self.position_embedding(jnp.arange(ids.shape[1]))


class TextModel(nnx.Module):
    """Tokens see those before them; the state of the first end token represents the text."""

    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        self.embeddings = TextEmbeddings(config, rngs=rngs)
        self.encoder = Encoder(config, rngs=rngs)
        self.final_layer_norm = _norm(config, rngs)
        self.end = config.eos_token_id

    def __call__(self, ids: Int[Array, "b l"]) -> Float[Array, "b d"]:
        mask = jnp.tril(jnp.ones((1, 1, *[ids.shape[1]] * 2), bool))
        x = self.final_layer_norm(self.encoder(self.embeddings(ids), mask))
        # Files from before transformers 4.30 give 2, and mean the largest token id.
        last = jnp.argmax(ids if self.end == 2 else ids == self.end, axis=1)
        return x[jnp.arange(len(ids)), last]


class VisionEmbeddings(nnx.Module):
    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        d, patch = config.hidden_size, config.patch_size
        count = (config.image_size // patch) ** 2 + 1
        self.class_embedding = nnx.Param(jax.random.normal(rngs.params(), (d,)))
        self.patch_embedding = nnx.Conv(
            config.num_channels,
            d,
            (patch, patch),
            patch,
            padding="VALID",
            use_bias=False,
            rngs=rngs,
        )
        self.position_embedding = nnx.Embed(count, d, rngs=rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Tokens:
        x = self.patch_embedding(x)
        x = x.reshape(len(x), -1, x.shape[-1])
        first = jnp.broadcast_to(self.class_embedding[...], (len(x), 1, x.shape[-1]))
        x = jnp.concatenate([first, x], axis=1)
        return x + self.position_embedding(jnp.arange(x.shape[1]))


class VisionModel(nnx.Module):
    """The state of a learned first token represents the image."""

    def __init__(self, config: TowerConfig, *, rngs: nnx.Rngs):
        self.embeddings = VisionEmbeddings(config, rngs=rngs)
        self.pre_layrnorm = _norm(config, rngs)  # spelled so in the files
        self.encoder = Encoder(config, rngs=rngs)
        self.post_layernorm = _norm(config, rngs)

    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b d"]:
        x = self.encoder(self.pre_layrnorm(self.embeddings(x)))
        return self.post_layernorm(x[:, 0])


class ClipModel(nnx.Module):
    def __init__(self, text: TowerConfig, vision: TowerConfig, width: int, *, rngs: nnx.Rngs):
        self.text_model = TextModel(text, rngs=rngs)
        self.vision_model = VisionModel(vision, rngs=rngs)
        linear = functools.partial(nnx.Linear, use_bias=False, rngs=rngs)
        self.text_projection = linear(text.hidden_size, width)
        self.visual_projection = linear(vision.hidden_size, width)


def _norm(config: TowerConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Clip:
    """A loaded CLIP with its tokenizer."""

    graph: nnx.GraphDef
    params: Params
    tokenizer: Tokenizer
    text: TowerConfig
    vision: TowerConfig

    def embed_texts(self, texts: Sequence[str]) -> Float[np.ndarray, "n d"]:
        """Embeddings of unit norm; long texts are truncated, as in other implementations."""
        return np.asarray(_text_features(self.graph, self.params, self.tokenize(texts)))

    def embed_images(self, images: Sequence[Pixels]) -> Float[np.ndarray, "n d"]:
        """Embeddings of unit norm, for images of any size."""
        pixels = np.stack([prepare(image, self.vision.image_size) for image in images])
        return np.asarray(_image_features(self.graph, self.params, pixels))

    def tokenize(self, texts: Sequence[str]) -> Int[np.ndarray, "n l"]:
        """Token ids, padded with the end token, of which the first counts."""
        length = self.text.max_position_embeddings
        rows = [self.tokenizer.encode(text).ids for text in texts]
        rows = [ids if len(ids) <= length else ids[: length - 1] + ids[-1:] for ids in rows]
        return np.array([ids + ids[-1:] * (length - len(ids)) for ids in rows], np.int32)


@functools.partial(jax.jit, static_argnums=0)
def _text_features(graph: nnx.GraphDef, params: Params, ids: AnyArray) -> Float[Array, "b d"]:
    model = nnx.merge(graph, params)
    return _unit(model.text_projection(model.text_model(jnp.asarray(ids))))


@functools.partial(jax.jit, static_argnums=0)
def _image_features(graph: nnx.GraphDef, params: Params, pixels: AnyArray) -> Float[Array, "b d"]:
    model = nnx.merge(graph, params)
    return _unit(model.visual_projection(model.vision_model(jnp.asarray(pixels))))


def _unit(x: Float[Array, "b d"]) -> Float[Array, "b d"]:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def prepare(image: Pixels, size: int) -> Float[np.ndarray, "size2 size2 3"]:
    """Resize the shorter side to `size` by pillow's bicubic filter, crop the centre, normalise."""
    height, width = image.shape[:2]
    scale = size / min(height, width)
    scaled = (max(size, int(width * scale)), max(size, int(height * scale)))
    picture = Image.fromarray(image).resize(scaled, Image.Resampling.BICUBIC)
    left, top = (picture.width - size) // 2, (picture.height - size) // 2
    pixels = np.asarray(picture.crop((left, top, left + size, top + size)), np.float32)
    return (pixels / 255 - MEAN) / STD


def score(
    images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]
) -> Float[np.ndarray, "n"]:
    """100 max(cos, 0) of each image and its text, as in torchmetrics and most papers.

    Hessel et al. 2021, who named it, use the factor 2.5 instead of 100.
    """
    return 100 * np.maximum((images * texts).sum(1), 0)


def r_precision(images: Float[np.ndarray, "n d"], texts: Float[np.ndarray, "n d"]) -> float:
    """The share of the images whose own text is the nearest of all texts (Park et al. 2021)."""
    similar = images @ texts.T
    return float((similar.argmax(1) == np.arange(len(images))).mean())


def load_clip(folder: str | os.PathLike) -> Clip:
    """Loads a Hugging Face folder: config.json, safetensors or .bin, tokenizer.json.

    Raises UserError for what is missing or does not fit.
    """
    folder = Path(folder)
    try:
        data = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is not a CLIP folder: {error}") from error
    if data.get("model_type") != "clip":
        raise UserError(f"{folder}: model_type = {data.get('model_type')!r} is not 'clip'.")
    text = TowerConfig.from_dict(data.get("text_config") or {})
    base = dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12)
    vision = TowerConfig.from_dict(data.get("vision_config") or {}, **base)
    width = data.get("projection_dim", 512)
    model = nnx.eval_shape(
        lambda: ClipModel(text, vision, width, rngs=ParamKeys(jax.random.key(0)))
    )
    graph, state = nnx.split(model)
    params = _filled(nnx.to_pure_dict(state), folder)
    if not (folder / "tokenizer.json").is_file():
        raise UserError(f"{folder} has no tokenizer.json.")
    pieces = Tokenizer.from_file(str(folder / "tokenizer.json"))
    pieces.no_padding()
    pieces.no_truncation()
    return Clip(graph, params, pieces, text, vision)


_PARTS = {"kernel": "weight", "scale": "weight", "embedding": "weight"}


def _filled(shapes: Params, folder: Path) -> Params:
    """The parameters, by their names in the files."""
    stored = {name: read() for name, read in loading.tensors(folder)}
    flat, wrong = {}, []
    for path, wanted in traverse_util.flatten_dict(shapes).items():
        *names, last = map(str, path)
        name = ".".join([*names, _PARTS.get(last, last)])
        value = stored.get(name)
        if value is not None and last == "kernel":
            value = value.T if value.ndim == 2 else value.transpose(2, 3, 1, 0)
        if value is None or value.shape != wanted.shape:
            wrong.append(f"{name} ({'missing' if value is None else value.shape})")
            continue
        flat[path] = jnp.asarray(value, jnp.float32)
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise UserError(f"{folder} does not fit its config.json: {', '.join(wrong[:3])}{more}.")
    return traverse_util.unflatten_dict(flat)
