"""The programs that can be planned: the train step, a denoising step, T5's encoding.

Each is the project's own function, traced with shapes instead of arrays: nothing is allocated.
"""

import collections
import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Jaxpr, jaxprs_in_params
from jax.typing import DTypeLike
from jaxtyping import PyTree

from imagen_jax import flops, nn, sampling, text
from imagen_jax.diffusion import samplers
from imagen_jax.diffusion.guidance import Guidance
from imagen_jax.sharding import Layout
from imagen_jax.stage import Stage
from imagen_jax.text.t5 import abstract_encoder
from train.optimizer import make_optimizer
from train.settings import Optimization
from train.state import TrainState
from train.step import make_train_step, step_flops

T5_XXL = text.T5Config(  # google/t5-v1_1-xxl, its config.json
    d_model=4096,
    d_kv=64,
    d_ff=10240,
    num_layers=24,
    num_heads=64,
    feed_forward_proj="gated-gelu",
)

Shape = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True, kw_only=True)
class Planned:
    """A program before it is compiled."""

    title: str
    per: str
    """What one call of it is: `step`, `denoising step`, `batch of captions`."""
    traced: Any
    arguments: Mapping[str, PyTree]
    """What it is given, in parts for a person; shapes with shardings."""
    model_flops: int
    """Operations of the model, recomputation not counted; of all devices together."""
    program_flops: int
    """Operations of the program as it is."""

    def argument_bytes(self) -> dict[str, int]:
        """Bytes of each part on one device, without the padding of tiles."""
        return {
            name: sum(map(_shard_bytes, jax.tree.leaves(x))) for name, x in self.arguments.items()
        }


def train_step(stage: Stage, settings: Optimization, layout: Layout) -> Planned:
    """The step of `python -m train.base`, and of `train.super_res`."""
    state = layout.targets(TrainState.shapes(stage.network, make_optimizer(settings)))
    batch = _batch(stage, settings.batch_size, layout)
    step = make_train_step(stage, settings, layout)
    traced = step.trace(state, batch, _key(layout))
    return Planned(
        title=f"training step of U-Net {stage.unet_number}, {settings.batch_size} images",
        per="step",
        traced=traced,
        arguments={
            "parameters": state.params,
            "their average": state.ema,
            "optimiser": state.opt_state,
            "batch": batch,
        },
        model_flops=step_flops(stage, settings),
        program_flops=flops.count_traced(traced.jaxpr.jaxpr),
    )


def sampling_step(stage: Stage, batch_size: int, dtype: DTypeLike, layout: Layout) -> Planned:
    """One step of the compiled loop that `Imagen.sample` runs; guided if there is text.

    Parameters have the dtype in which a loaded cascade keeps them.
    """
    program = sampling.Program(
        stage=stage, dtype=dtype, guided=stage.condition_on_text, sampler=stage.process.sampler
    )
    params = layout.targets(nn.stored_shapes(nn.abstract(stage.network)[1], dtype))
    batch = _batch(stage, batch_size, layout)
    given = sampling.Given(text_embeds=batch.get("text_embeds"), text_masks=batch.get("text_masks"))
    if stage.lowres is not None:
        small = Shape((batch_size, *stage.lowres.size, stage.channels), jnp.float32)
        given = given._replace(previous=small, lowres_noise_level=Shape((), jnp.float32))
    keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), batch_size))
    randomness = sampling.Randomness(
        keys=Shape(keys.shape, keys.dtype, sharding=layout.rows(batch_size))
    )
    grid = samplers.make_grid(stage.process, 1000)
    grid = jax.tree.map(lambda x: Shape(x.shape, x.dtype, sharding=layout.replicated), grid)
    begin = functools.partial(sampling.start, program=program, batch_size=batch_size)
    state, conditioning, inpaint = _by_rows(
        jax.eval_shape(begin, params, given, randomness, grid), layout
    )
    scalar = Shape((), jnp.float32, sharding=layout.replicated)
    bound = Shape((), jnp.int32, sharding=layout.replicated)
    options = samplers.Options(*[scalar] * len(samplers.Options()))
    numbers = sampling.Numbers(Guidance(scalar, scalar), scalar, scalar, options)
    with layout.use():
        traced = sampling.compiled_advance(layout.mesh.devices.flat[0]).trace(
            params, state, conditioning, inpaint, numbers, grid, bound, bound, randomness,
            program=program,
        )  # fmt: skip

    def once(params, x, conditioning, numbers, position):
        network = sampling.estimator(params, conditioning, numbers, program)
        previous = (x,) if stage.network.self_cond else ()
        return network(x, stage.process.level(position), *previous)

    position = Shape((batch_size,), jnp.float32)
    arithmetic = flops.count(once, params, state.x, conditioning, numbers, position)
    guided = ", guided" * program.guided
    return Planned(
        title=f"sampling step of U-Net {stage.unet_number}, {batch_size} images{guided}",
        per="denoising step",
        traced=traced,
        arguments={"parameters": params, "images": state, "conditioning": conditioning},
        model_flops=arithmetic,
        program_flops=arithmetic,
    )


def text_encoding(batch_size: int, length: int, dtype: DTypeLike, layout: Layout) -> Planned:
    """T5-XXL, as training and sampling encode captions."""
    shapes = abstract_encoder(T5_XXL, dtype)[1]
    params = layout.targets(jax.tree.map(lambda x: Shape(x.shape, dtype), shapes))
    rows = layout.rows(batch_size)
    tokens = Shape((batch_size, length), jnp.int32, sharding=rows)
    encode = layout.on_mesh(lambda params, tokens: text.encode(params, T5_XXL, tokens))
    encode = jax.jit(encode, out_shardings=rows)
    traced = encode.trace(params, tokens)
    arithmetic = flops.count_traced(traced.jaxpr.jaxpr)
    return Planned(
        title=f"T5-XXL, {batch_size} captions of {length} tokens",
        per="batch of captions",
        traced=traced,
        arguments={"parameters": params, "tokens": tokens},
        model_flops=arithmetic,
        program_flops=arithmetic,
    )


def activations(planned: Planned, layout: Layout) -> list[tuple[int, str]]:
    """(bytes on one device, what) of the results of products and convolutions, largest first.

    For a program that did not compile: read from its trace, with arrays of the same shape together,
    as if all were kept and split over all devices.
    """
    found = collections.Counter(_products(planned.traced.jaxpr.jaxpr))
    return sorted(
        (
            times * math.prod(shape) * dtype.itemsize // layout.mesh.size,
            f"{times} x {dtype.name}[{','.join(map(str, shape))}]",
        )
        for (shape, dtype), times in found.items()
    )[::-1]


def _products(jaxpr: Jaxpr) -> Iterator[tuple[tuple[int, ...], Any]]:
    for equation in jaxpr.eqns:
        if equation.primitive.name in ("dot_general", "conv_general_dilated"):
            yield equation.outvars[0].aval.shape, equation.outvars[0].aval.dtype
        for inner in jaxprs_in_params(equation.params):
            yield from _products(inner)


def _batch(stage: Stage, batch_size: int, layout: Layout) -> dict[str, Shape]:
    """What the data pipeline and the text encoder return."""
    rows = layout.rows(batch_size)
    batch = {"images": Shape((batch_size, *stage.sample_shape), jnp.uint8, sharding=rows)}
    if stage.condition_on_text:
        tokens = (batch_size, stage.network.text_len)
        embeds = (*tokens, stage.network.text_embed_dim)
        batch["text_embeds"] = Shape(embeds, jnp.float32, sharding=rows)
        batch["text_masks"] = Shape(tokens, jnp.bool_, sharding=rows)
    return batch


def _key(layout: Layout) -> Shape:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return Shape(key.shape, key.dtype, sharding=layout.replicated)


def _by_rows(tree: PyTree, layout: Layout) -> PyTree:
    """Shapes of arrays of pictures, or of pairs of them, split by rows."""
    return jax.tree.map(
        lambda x: Shape(
            x.shape, x.dtype, sharding=layout.rows(x.shape[0]) if x.ndim else layout.replicated
        ),
        tree,
    )


def _shard_bytes(x: Shape) -> int:
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize
