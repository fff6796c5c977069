"""Compares our networks for DeepFloyd IF's stages with diffusers', on the same inputs."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import PIL.Image

from imagen_jax import nn
from imagen_jax.errors import UserError, first_line
from imagen_jax.if_config import IF_TEXT_LENGTH, IFUnetConfig
from imagen_jax.imagen import Imagen
from imagen_jax.interop import deepfloyd, if_configuration, keys
from imagen_jax.interop.deepfloyd import Read, Variant
from imagen_jax.interop.if_table import IF_UNET

TOLERANCE = 1e-4
"""Relative to the largest value of the output, in float32."""


def prove(folder: Path, variant: Variant | None = None) -> str:
    """A line that says how far a folder's stage is from diffusers'. Raises UserError if they do not
    agree."""
    found = difference(deepfloyd.read(folder, variant), variant)
    line = f"{folder}: differs from diffusers by {found:.1e} of the largest output"
    if not found <= TOLERANCE:
        raise UserError(f"{line}; the tolerance is {TOLERANCE:.0e}.")
    return line


def difference(read: Read, variant: Variant | None = None) -> float:
    """The largest difference of the two networks' outputs, divided by the largest output. Raises
    UserError if torch or diffusers is missing, or cannot read the folder."""
    given = inputs(read.unet, read.size)
    wanted = theirs(read, variant, given)
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), read.params)
    with jax.default_matmul_precision("highest"):
        got = np.asarray(nn.bind(read.unet, params)(**given))
    return float(np.abs(got - wanted).max() / np.abs(wanted).max())


def inputs(unet: IFUnetConfig, size: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Noise, steps and text for two images."""
    random = np.random.default_rng(seed)
    found = {
        "x": random.normal(size=(2, size, size, unet.channels)),
        "time": np.array([7, 900]),
        "text_embeds": random.normal(size=(2, IF_TEXT_LENGTH, unet.text_embed_dim)),
    }
    if unet.lowres_cond:
        found["lowres_cond_img"] = random.normal(size=found["x"].shape)
        found["lowres_noise_times"] = np.array([250, 10])
    return {name: value.astype(np.float32) for name, value in found.items()}


def draw(stages: Sequence[Read], t5: str, prompt: str, seed: int = 0) -> PIL.Image.Image:
    """A picture of the prompt, drawn by the stages with IF's guidance in 20 and 15 steps."""
    config = dataclasses.replace(deepfloyd.cascade(stages), text_encoder_name=t5)
    bound = [
        nn.bind(unet, jax.tree.map(jnp.asarray, read.params), dtype=nn.compute_dtype())
        for unet, read in zip(config.unets, stages, strict=True)
    ]
    (picture,) = Imagen(config, unets=bound).sample(
        texts=[prompt],
        key=jax.random.key(seed),
        cond_scale=(7.0, 4.0)[: len(stages)],
        timesteps=(20, 15)[: len(stages)],
        sampler="dpm++2m-sde",
        return_pil_images=True,
    )
    return picture


def theirs(read: Read, variant: Variant | None, given: dict[str, np.ndarray]) -> np.ndarray:
    """diffusers' output, with the weights as it reads them from the folder; for the original
    layout, which it cannot read, with those read here."""
    try:
        import torch
        from diffusers import UNet2DConditionModel
    except (ImportError, RuntimeError) as error:
        raise UserError(f"comparing needs torch and diffusers: {first_line(error)}") from error
    if (read.folder / "unet").is_dir():
        network = UNet2DConditionModel.from_pretrained(
            read.folder / "unet", variant=variant, torch_dtype=torch.float32
        )
    else:
        described = if_configuration.to_diffusers(read.unet, read.size)
        network = UNet2DConditionModel.from_config(described)
        state = keys.to_torch(read.params, table=IF_UNET)
        network.load_state_dict(
            {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}
        )
    with torch.no_grad():
        return answer(network.eval(), given).numpy()


def answer(network: Any, given: dict[str, np.ndarray]) -> Any:
    """The output of diffusers' network for `inputs`, as a torch tensor (b, h, w, c)."""
    import torch

    images = [given[name] for name in ("x", "lowres_cond_img") if name in given]
    labels = given.get("lowres_noise_times")
    found = network(
        torch.from_numpy(np.concatenate(images, -1)).permute(0, 3, 1, 2),
        torch.from_numpy(given["time"]),
        torch.from_numpy(given["text_embeds"]),
        class_labels=None if labels is None else torch.from_numpy(labels),
    )
    return found.sample.permute(0, 2, 3, 1)
