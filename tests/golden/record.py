"""What imagen-pytorch 2.1.0 computes, recorded, for the day on which it cannot be installed.

    python -m tests.golden.record    # writes tests/golden/outputs.npz; needs torch, imagen-pytorch

Weights and inputs come from NumPy's `RandomState`, whose numbers never change; the outputs are
stored. `tests/test_golden.py` compares the live reference and ours with them.
"""

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from imagen_jax import nn
from imagen_jax.config import ImagenConfig, UnetConfig
from imagen_jax.interop import keys
from imagen_jax.training import Draws
from tests import SMALLEST_UNET

FILE = Path(__file__).with_name("outputs.npz")
BATCH, WIDTH, STEPS = 2, 6, 4
UNET = UnetConfig(**SMALLEST_UNET, cond_dim=6, max_text_len=6, text_embed_dim=WIDTH)
CASCADE = ImagenConfig(
    unets=(UNET, dataclasses.replace(UNET, memory_efficient=True)),
    image_sizes=(5, 8),
    text_embed_dim=WIDTH,
    timesteps=STEPS,
    pred_objectives=("noise", "v"),
)
UNETS = {
    "base": dataclasses.replace(
        UNET, dim_mults=(1, 2), layer_attns=(False, True), layer_cross_attns=(False, True),
        attn_pool_text=True, attn_pool_num_latents=3, use_global_context_attn=True,
    ),
    "super-resolution": dataclasses.replace(
        UNET, lowres_cond=True, memory_efficient=True, self_cond=True, init_cross_embed=True,
        init_cross_embed_kernel_sizes=(3, 7), attend_at_middle=True,
    ),
    "linear attention": dataclasses.replace(
        UNET, use_linear_attn=True, use_linear_cross_attn=True, pixel_shuffle_upsample=False,
        combine_upsample_fmaps=True,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    kind: str  # "unet", "loss" or "sample"
    config: ImagenConfig
    unet_number: int = 1  # of a U-Net or a loss
    told: dict[str, Any] = dataclasses.field(default_factory=dict)  # of a sample


def alone(unet: UnetConfig) -> ImagenConfig:
    return ImagenConfig(unets=unet, image_sizes=8, text_embed_dim=WIDTH)


CASES = [
    *(Case(f"unet {name}", "unet", alone(unet)) for name, unet in UNETS.items()),
    Case("loss base", "loss", CASCADE),
    Case("loss super-resolution", "loss", CASCADE, unet_number=2),
    Case("sample", "sample", CASCADE),
    Case("sample guided", "sample", CASCADE, told=dict(cond_scale=3.0)),
]


def inputs_of(case: Case) -> dict[str, Any]:
    """Keyword arguments of ours: of a network, of `Imagen.loss` or of `Imagen.sample`."""
    random = np.random.RandomState(7)

    def noise(*shape) -> np.ndarray:
        return random.standard_normal(shape).astype(np.float32)

    text = dict(text_embeds=noise(BATCH, 4, WIDTH), text_masks=np.arange(4) < [[4], [2]])
    if case.kind == "unet":
        text["text_mask"] = text.pop("text_masks")
        found = dict(x=noise(BATCH, 8, 8, 3), time=np.float32([-3.0, 2.5])) | text
        config = case.config.unets[0]
        if config.lowres_cond:
            found["lowres_cond_img"] = noise(BATCH, 8, 8, 3)
            found["lowres_noise_times"] = np.float32([0.5, 1.0])
        if config.self_cond:
            found["self_cond"] = noise(BATCH, 8, 8, 3)
        return found | dict(keep_mask=np.array([True, False]))
    if case.kind == "sample":
        sizes = enumerate(case.config.image_sizes)
        return text | dict(draws=[noise(STEPS + 1 + i, BATCH, size, size, 3) for i, size in sizes])
    size = case.config.stage(case.unet_number).size
    larger = case.unet_number > 1
    draws = Draws(
        times=np.float32([0.2, 0.9]),
        noise=noise(BATCH, *size, 3),
        lowres_times=np.full(BATCH, 0.3, np.float32) if larger else None,
        lowres_noise=noise(BATCH, *size, 3) if larger else None,
        keep_mask=np.array([True, False]),
    )
    images = random.uniform(size=(BATCH, 8, 8, 3)).astype(np.float32)
    return text | dict(images=images, draws=draws, unet_number=case.unet_number)


def weights_of(unet: UnetConfig, seed: int) -> dict[str, np.ndarray]:
    """A state dict of the reference's: gains around one, the rest around zero, of unit gain."""
    empty = jax.tree.map(lambda leaf: np.broadcast_to(0.0, leaf.shape), nn.abstract(unet)[1])
    found = {}
    for name, array in keys.to_torch(empty).items():
        random = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
        noise = random.standard_normal(array.shape)
        if name.endswith((".g", "gamma", "_scale")) or (name.endswith("weight") and noise.ndim < 2):
            noise = 1 + 0.2 * noise
        elif name.endswith("bias"):
            noise = 0.2 * noise
        elif name.endswith("weight") and "pos_emb" not in name:
            noise = noise / noise[0].size ** 0.5
        found[name] = noise.astype(np.float32)
    return found


def reference(case: Case) -> np.ndarray:
    """The output of the live reference, channels last."""
    import torch

    from tests import cascades, parity

    given, alone = inputs_of(case), case.kind == "unet"
    networks = [parity.build_unet(unet) for unet in case.config.unets]
    imagen = networks[0] if alone else cascades.theirs(case.config, networks)
    with torch.no_grad():
        for i, (network, unet) in enumerate(zip(networks, case.config.unets, strict=True)):
            state = weights_of(unet, i)
            network.load_state_dict({n: torch.from_numpy(a) for n, a in state.items()})
        if alone:
            return cascades.to_numpy(parity.forward(imagen.eval(), given))
        if case.kind == "loss":
            images = given.pop("images")
            return np.float32(cascades.reference_loss(imagen, images, **given)[0])
        pictures = cascades.reference_sample(imagen, given.pop("draws"), **given, **case.told)
        return cascades.to_numpy(pictures)


def recorded(case: Case) -> np.ndarray:
    with np.load(FILE) as file:
        return file[case.name]


def main() -> None:
    np.savez_compressed(FILE, **{case.name: reference(case) for case in CASES})


if __name__ == "__main__":
    main()
