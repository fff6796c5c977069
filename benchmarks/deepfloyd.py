"""A U-Net of DeepFloyd IF's architecture beside diffusers, with the same weights, on this machine.

    python -m benchmarks.deepfloyd                  # small widths, on a CPU
    python -m benchmarks.deepfloyd --dim 192 --size 64 --dtype bfloat16    # M, on an accelerator

One network evaluation of a guided batch (two rows an image), and guided sampling of ten steps, as
IFPipeline does it (ancestral, dynamic thresholding, learned variance). Each side is warmed up and
timed in turn; medians. Torch runs eagerly and uses all cores, as JAX does.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import commands
from imagen_jax import DiscreteConfig, Imagen, ImagenConfig, nn
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.interop import if_configuration, keys
from imagen_jax.interop.if_table import IF_UNET
from imagen_jax.interop.reference import import_imagen_pytorch
from imagen_jax.presets import IFStageI
from imagen_jax.types import Params

WIDTH, TOKENS, STEPS, ROUNDS, WEIGHT = 4096, 77, 10, 7, 7.0
NONE = dict(
    watermarker=None, tokenizer=None, text_encoder=None, safety_checker=None, feature_extractor=None
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dim", type=int, default=64, help="192 is M, 320 L, 704 XL")
    parser.add_argument("--size", type=int, default=32, help="pixels")
    parser.add_argument("--batch", type=int, default=1, help="images")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    args = parser.parse_args()
    commands.keep_memory()
    import_imagen_pytorch()  # it mends torchvision, which diffusers' models import
    import torch
    from diffusers import UNet2DConditionModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, args.dtype)
    config = IFStageI(dim=args.dim)
    torch.manual_seed(0)
    theirs = UNet2DConditionModel.from_config(if_configuration.to_diffusers(config, args.size))
    theirs = theirs.eval().to(device, dtype)
    count = sum(p.numel() for p in theirs.parameters())
    print(f"{count / 1e6:.1f} M parameters, {args.size} pixels, {args.batch} guided, {device}")
    params = converted(theirs, config, args.dtype)
    rng = np.random.default_rng(0)
    embeds = rng.normal(size=(2, args.batch, TOKENS, WIDTH)).astype(np.float32) / 8
    network = theirs
    if args.compile:
        network = torch.compile(theirs, mode="max-autotune")
    report(
        "a guided evaluation",
        their_step(network, embeds, args.size, device, dtype),
        our_step(config, params, embeds, args.size, args.dtype),
    )
    report(
        f"{STEPS} guided steps",
        their_sampling(theirs, embeds, args.size, device, dtype),
        our_sampling(config, params, embeds, args.size, args.dtype),
    )


def converted(network: Any, config: IFUnetConfig, dtype: str) -> Params:
    state = {name: value.float().cpu().numpy() for name, value in network.state_dict().items()}
    params = keys.to_jax(state, nn.abstract(config)[1], table=IF_UNET)
    return jax.tree.map(lambda x: jnp.asarray(x, dtype), params)


def their_step(network, embeds: np.ndarray, size: int, device: str, dtype) -> Callable:
    import torch

    text = torch.from_numpy(np.concatenate(embeds)).to(device, dtype)
    x = torch.randn(len(text), 3, size, size, device=device, dtype=dtype)

    @torch.inference_mode()
    def run():
        answer = network(x, 500, encoder_hidden_states=text, return_dict=False)[0]
        answer.float().sum().item()

    return run


def our_step(config, params: Params, embeds: np.ndarray, size: int, dtype: str) -> Callable:
    text = np.concatenate(embeds)
    x = np.random.default_rng(1).normal(size=(len(text), size, size, 3)).astype(np.float32)

    @jax.jit
    def evaluate(params, x, text):
        network = nn.bind(config, params, dtype=dtype)
        level = jnp.full(len(x), 500.0)
        return network(x, level, text_embeds=text)

    x, text = jnp.asarray(x), jnp.asarray(text)
    return lambda: jax.block_until_ready(evaluate(params, x, text))


def their_sampling(network, embeds: np.ndarray, size: int, device: str, dtype) -> Callable:
    import torch
    from diffusers import DDPMScheduler, IFPipeline

    schedule = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True,
        dynamic_thresholding_ratio=0.95, sample_max_value=1.5, clip_sample=True,
    )  # fmt: skip
    pipe = IFPipeline(unet=network, scheduler=schedule, requires_safety_checker=False, **NONE)
    pipe.set_progress_bar_config(disable=True)
    text, empty = (torch.from_numpy(one).to(device, dtype) for one in embeds)
    arguments = dict(prompt_embeds=text, negative_prompt_embeds=empty, guidance_scale=WEIGHT)
    arguments |= dict(height=size, width=size, num_inference_steps=STEPS, output_type="np")
    return lambda: pipe(clean_caption=False, **arguments).images


def our_sampling(config, params: Params, embeds: np.ndarray, size: int, dtype: str) -> Callable:
    cascade = ImagenConfig(
        unets=(config,), image_sizes=(size,), text_embed_dim=WIDTH, discrete=DiscreteConfig(),
        resize_mode="bilinear_corners",
    )  # fmt: skip
    imagen = Imagen(cascade, unets=[nn.bind(cascade.unets[0], params, dtype=dtype)])
    mask = np.ones(embeds.shape[1:3], bool)
    arguments = dict(
        text_embeds=embeds[0], text_masks=mask, negative_text_embeds=embeds[1],
        negative_text_masks=mask, cond_scale=WEIGHT, sampler="ancestral", timesteps=STEPS,
    )  # fmt: skip
    return lambda: np.asarray(imagen.sample(key=jax.random.key(0), **arguments))


def report(what: str, theirs: Callable, ours: Callable) -> None:
    sides = {"diffusers": theirs, "ours": ours}
    found: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
    for _ in range(ROUNDS):
        for name, run in sides.items():
            began = time.perf_counter()
            run()
            found[name].append(time.perf_counter() - began)
    seconds = {name: statistics.median(values) for name, values in found.items()}
    times = ", ".join(f"{name} {1e3 * value:.0f} ms" for name, value in seconds.items())
    print(f"{what}: {times}; {seconds['diffusers'] / seconds['ours']:.2f} times")


if __name__ == "__main__":
    main()
