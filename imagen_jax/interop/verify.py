"""Verifies that a run directory has the weights of a file of imagen-pytorch.

(a) Converting back gives every tensor of the file again, bit for bit.
(b) Every stage gives the same output in both frameworks, with text and without.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from imagen_jax import nn
from imagen_jax.checkpoint import Weights
from imagen_jax.config import NullUnetConfig, UnetConfig
from imagen_jax.errors import UserError
from imagen_jax.interop import keys, reference
from imagen_jax.interop.imagen_pytorch import Checkpoint, StateDict, same_bits
from imagen_jax.interop.run_dir import RunDir
from imagen_jax.types import Params

TOLERANCE = 1e-4  # of the output's largest value
FINAL = ("final_conv.weight", "final_conv.bias")


@dataclasses.dataclass(frozen=True)
class Forward:
    """One stage compared: the largest difference over the largest value of the reference's."""

    unet_number: int
    weights: Weights
    with_text: float
    without: float

    @property
    def agrees(self) -> bool:
        return max(self.with_text, self.without) <= TOLERANCE  # False for NaN


def prove(source: Checkpoint, run: RunDir, kept: Sequence[Weights]) -> Iterator[str]:
    """A line for each comparison. Raises UserError for the first that fails, and before all of them
    for a tensor with values that are not finite, as no outputs could agree."""
    for which in kept:
        source.check_finite(which)
    for which in kept:
        wrong = differences(source, run, which)
        count = sum(map(len, source.weights(which)))
        if wrong:
            shown = ", ".join(wrong[:10]) + (", ..." if len(wrong) > 10 else "")
            raise UserError(f"verify (a), {which}: {len(wrong)} of {count} differ: {shown}")
        yield f"verify (a), {which}: all {count} tensors come back bit for bit"
    try:
        for which in kept:
            for found in forwards(source, run, which):
                errors = f"{found.with_text:.1e} with text, {found.without:.1e} without"
                line = f"verify (b), {which}, U-Net {found.unet_number}: {errors}"
                if not found.agrees:
                    raise UserError(
                        f"{line}; the tolerance is {TOLERANCE} of the output. (a) passed, so the "
                        "weights are the same: the networks differ, rounding alone is this large, "
                        "or values overflow (nan)."
                    )
                yield line
    except ImportError as error:
        yield f"verify (b) did not run: {error}"


def differences(source: Checkpoint, run: RunDir, which: Weights) -> list[str]:
    """(a): the names of the file's tensors that the run does not give back bit for bit.

    Raises ValueError if the run does not have these weights for every U-Net.
    """
    return [
        f"unets.{i}.{name}"
        for i, state in enumerate(source.weights(which))
        for name in differing(state, run.params(i + 1, which))
    ]


def differing(state: StateDict, params: Params) -> list[str]:
    """The tensors of a state dict that our parameters do not give back bit for bit."""
    back = keys.to_torch(params)
    return [
        name
        for name in sorted(state.keys() | back.keys())
        if name not in state or name not in back or not same_bits(state[name], back[name])
    ]


def forwards(source: Checkpoint, run: RunDir, which: Weights) -> Iterator[Forward]:
    """(b): the stages compared, one after another. Raises ImportError without imagen-pytorch."""
    for number, state in enumerate(source.weights(which), 1):
        unet = source.config.unets[number - 1]
        if isinstance(unet, NullUnetConfig):
            continue
        theirs = reference_outputs(unet, state)
        params = run.params(number, which)
        errors = compare(theirs, outputs(unet, params))
        yield Forward(number, which, *errors)


def compare(theirs: np.ndarray, ours: np.ndarray) -> list[float]:
    """The largest difference of each output, divided by the reference's largest value."""
    return [float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(theirs, ours, strict=True)]


def outputs(unet: UnetConfig, params: Params) -> np.ndarray:
    """Our outputs (2, b, h, w, c), with text and without, for the inputs of `make_inputs`."""
    params = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
    final = params["final_conv"]
    if not any(np.any(leaf) for leaf in final.values()):
        weight, bias = _random_final(unet)
        params = params | {
            "final_conv": {"kernel": jnp.asarray(weight.transpose(2, 3, 1, 0)), "bias": bias}
        }
    inputs, keep_masks = make_inputs(unet), np.array([[True, True], [False, False]])
    with jax.default_matmul_precision("highest"):
        return np.stack([_forward(params, inputs, keep, unet=unet) for keep in keep_masks])


def reference_outputs(unet: UnetConfig, state: StateDict) -> np.ndarray:
    """The reference's outputs, NHWC, for the same inputs and the tensors of a state dict."""
    import torch

    module = reference.build_unet(unet)
    tensors = {name: np.ascontiguousarray(a, np.float32) for name, a in state.items()}
    if not any(np.any(tensors[name]) for name in FINAL):
        tensors |= dict(zip(FINAL, _random_final(unet), strict=True))
    module.load_state_dict({name: torch.from_numpy(a.copy()) for name, a in tensors.items()})
    inputs = {
        name: torch.from_numpy(np.moveaxis(a, -1, 1).copy() if a.ndim == 4 else a)
        for name, a in make_inputs(unet).items()
    }
    with torch.no_grad():
        pair = [module.eval()(**inputs, cond_drop_prob=drop).numpy() for drop in (0.0, 1.0)]
    return np.moveaxis(np.stack(pair), 2, -1)


def make_inputs(unet: UnetConfig) -> dict[str, np.ndarray]:
    """Fixed inputs that use every part: two small pictures, two texts of different lengths."""
    random = np.random.default_rng(0)
    size = 2 * unet.downsampling

    def picture(channels: int) -> np.ndarray:
        return random.standard_normal((2, size, size, channels), np.float32)

    inputs: dict[str, Any] = dict(x=picture(unet.channels), time=np.float32([-3.0, 1.5]))
    if unet.lowres_cond:
        inputs["lowres_cond_img"] = picture(unet.channels)
        inputs["lowres_noise_times"] = np.float32([0.7, 2.0])
    if unet.cond_images_channels:
        inputs["cond_images"] = picture(unet.cond_images_channels)
    if unet.self_cond:
        inputs["self_cond"] = picture(unet.channels)
    if unet.cond_on_text:
        length = max(2, unet.max_text_len - 1)
        inputs["text_embeds"] = random.standard_normal((2, length, unet.text_embed_dim), np.float32)
        inputs["text_mask"] = np.arange(length) < np.array([[length], [(length + 1) // 2]])
    return inputs


@functools.partial(jax.jit, static_argnames="unet")
def _forward(
    params: Params, inputs: Mapping[str, jax.Array], keep_mask: jax.Array, *, unet: UnetConfig
) -> jax.Array:
    return nn.bind(unet, params)(**inputs, keep_mask=keep_mask)


def _random_final(unet: UnetConfig) -> tuple[np.ndarray, np.ndarray]:
    """Weights for a last convolution that is all zeros, as before training."""
    *_, c_in, c_out = nn.abstract(unet)[1]["final_conv"]["kernel"].shape
    size = unet.final_conv_kernel_size
    random = np.random.default_rng(1)
    weight = random.standard_normal((c_out, c_in, size, size), np.float32) / np.sqrt(c_in * size**2)
    return weight.astype(np.float32), random.standard_normal(c_out, np.float32)
