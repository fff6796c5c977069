"""DeepFloyd IF's base, here and in diffusers, on this machine.

    python -m benchmarks.deepfloyd                       # a CPU: a small U-Net of its architecture
    python -m benchmarks.deepfloyd --model M L XL --batch 1 4 --dtype bfloat16 --compile    # a GPU

Images are guided, so each takes two rows of the network. A guided evaluation is one call of the
network; a step is one of the complete sampling loop, as in IFPipeline (ancestral, dynamic
thresholding, learned variance). The sides take turns, each in its own process; compilation and
warm-up are not timed, and medians are printed. Weights are random on both sides: they cost as much
as trained ones. On a CPU torch uses all cores, as JAX does; with --compile a third side runs
diffusers under torch.compile, with CUDA graphs and channels last.
"""

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import commands
from benchmarks.unet import hardware
from imagen_jax import DiscreteConfig, Imagen, ImagenConfig, nn
from imagen_jax.if_config import IFUnetConfig
from imagen_jax.interop import if_configuration
from imagen_jax.interop.reference import import_imagen_pytorch
from imagen_jax.presets import IFStageI

WIDTH, TOKENS, WEIGHT = 4096, 77, 7.0
NONE = dict(
    watermarker=None, tokenizer=None, text_encoder=None, safety_checker=None, feature_extractor=None
)
MODELS = {
    "small": (IFStageI(dim=64), 32),
    **{name: (IFStageI(name), 64) for name in ("M", "L", "XL")},
}
"""Configuration and pixels."""


@dataclasses.dataclass(frozen=True)
class Case:
    model: str
    batch: int
    dtype: str
    steps: int

    @property
    def config(self) -> IFUnetConfig:
        return MODELS[self.model][0]

    @property
    def size(self) -> int:
        return MODELS[self.model][1]

    def embeds(self) -> np.ndarray:
        """Of the texts, and of the empty ones."""
        shape = (2, self.batch, TOKENS, WIDTH)
        return np.random.default_rng(0).normal(size=shape).astype(np.float32) / 8

    def __str__(self) -> str:
        return f"{self.model}, {self.size} pixels, {self.batch}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=MODELS, default=["small"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1], help="images per batch")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=3, help="processes per side")
    parser.add_argument(
        "--compile", action="store_true", help="also run diffusers under torch.compile"
    )
    parser.add_argument("--side", choices=SIDES, help="measure only this side, in this process")
    args = parser.parse_args()
    cases = [Case(m, b, args.dtype, args.steps) for m in args.model for b in args.batch]
    if args.side:
        commands.keep_memory()
        for case in cases:
            print(json.dumps({str(case): measure(SIDES[args.side], case)}), flush=True)
        return
    sides = [side for side in SIDES if args.compile or side != "diffusers compiled"]
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for number in range(args.rounds):
        for side in sides:
            print(f"round {number + 1} of {args.rounds}: {side}", file=sys.stderr)
            command = [sys.executable, "-m", "benchmarks.deepfloyd", *sys.argv[1:], "--side", side]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            lines = [json.loads(line) for line in done.stdout.splitlines() if line[:1] == "{"]
            runs[side].append({name: one for line in lines for name, one in line.items()})
    print(table(runs))


def table(runs: dict[str, list[dict[str, Any]]]) -> str:
    """Medians over the rounds; a ratio is that of the medians, above 1 where ours is faster."""
    others = [side for side in runs if side != "ours"]
    lines = [
        f"Hardware: {hardware()}",
        "",
        f"| model, pixels, images | what | {' | '.join(runs)} | times as fast |",
        "|---" * (len(runs) + 3) + "|",
    ]
    for case, whats in runs["ours"][0].items():
        for what in whats:
            found = {
                side: statistics.median(one[case][what] for one in rounds)
                for side, rounds in runs.items()
            }
            cells = " | ".join(f"{1e3 * seconds:.1f} ms" for seconds in found.values())
            ratios = ", ".join(f"{found[side] / found['ours']:.2f}" for side in others)
            lines.append(f"| {case} | {what} | {cells} | {ratios} |")
    return "\n".join(lines)


def measure(side: Callable[[Case], Iterator[tuple[str, int, Callable]]], case: Case) -> dict:
    """Seconds of each: the median of three calls after one."""
    found = {}
    for what, count, run in side(case):
        began = time.perf_counter()
        run()
        print(f"{case}, {what}: first {time.perf_counter() - began:.1f} s", file=sys.stderr)
        seconds = []
        for _ in range(3):
            began = time.perf_counter()
            run()
            seconds.append((time.perf_counter() - began) / count)
        found[what] = statistics.median(seconds)
    return found


def ours(case: Case) -> Iterator[tuple[str, int, Callable]]:
    dtype, embeds = jnp.dtype(case.dtype), case.embeds()
    cascade = ImagenConfig(
        unets=(case.config,), image_sizes=(case.size,), text_embed_dim=WIDTH,
        discrete=DiscreteConfig(), resize_mode="bilinear_corners",
    )  # fmt: skip
    unet = cascade.unets[0]
    params = jax.tree.map(
        lambda x: 0.02 * jax.random.normal(jax.random.key(0), x.shape, dtype), nn.abstract(unet)[1]
    )

    @jax.jit
    def evaluate(params, x, text):
        network = nn.bind(unet, params, dtype=dtype)
        return network(x, jnp.full(len(x), 500.0), text_embeds=text)

    text = jnp.concatenate(embeds)
    x = jax.random.normal(jax.random.key(1), (len(text), case.size, case.size, 3))
    yield "guided evaluation", 1, lambda: jax.block_until_ready(evaluate(params, x, text))
    imagen = Imagen(cascade, unets=[nn.bind(unet, params, dtype=dtype)])
    mask = np.ones(embeds.shape[1:3], bool)
    arguments = dict(
        text_embeds=embeds[0], text_masks=mask, negative_text_embeds=embeds[1],
        negative_text_masks=mask, cond_scale=WEIGHT, sampler="ancestral", timesteps=case.steps,
        cfg_remove_parallel_component=False,
    )  # fmt: skip
    yield (
        "guided step",
        case.steps,
        lambda: np.asarray(imagen.sample(key=jax.random.key(0), **arguments)),
    )


def diffusers(case: Case, *, compiled: bool = False) -> Iterator[tuple[str, int, Callable]]:
    import_imagen_pytorch()  # it mends torchvision, which diffusers' models import
    import torch
    from diffusers import DDPMScheduler, IFPipeline, UNet2DConditionModel

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, embeds = getattr(torch, case.dtype), case.embeds()
    with torch.device("meta"):
        network = UNet2DConditionModel.from_config(
            if_configuration.to_diffusers(case.config, case.size)
        )
    network = network.to_empty(device=device).to(dtype).eval().requires_grad_(False)
    for weights in network.parameters():
        torch.nn.init.normal_(weights, std=0.02)
    if compiled:
        network.to(memory_format=torch.channels_last)
        network = torch.compile(network, mode="reduce-overhead", fullgraph=True)
    text = torch.from_numpy(np.concatenate(embeds)).to(device, dtype)
    x = torch.randn(len(text), 3, case.size, case.size, device=device, dtype=dtype)

    @torch.inference_mode()
    def evaluate():
        answer = network(x, 500, encoder_hidden_states=text, return_dict=False)[0]
        answer.float().sum().item()

    yield "guided evaluation", 1, evaluate
    schedule = DDPMScheduler(
        beta_schedule="squaredcos_cap_v2", variance_type="learned_range", thresholding=True,
        dynamic_thresholding_ratio=0.95, sample_max_value=1.5, clip_sample=True,
    )  # fmt: skip
    pipe = IFPipeline(unet=network, scheduler=schedule, requires_safety_checker=False, **NONE)
    pipe.set_progress_bar_config(disable=True)
    wanted, empty = text.chunk(2)
    arguments = dict(prompt_embeds=wanted, negative_prompt_embeds=empty, guidance_scale=WEIGHT)
    arguments |= dict(height=case.size, width=case.size, num_inference_steps=case.steps)
    yield (
        "guided step",
        case.steps,
        lambda: pipe(clean_caption=False, output_type="np", **arguments).images,
    )


def diffusers_compiled(case: Case) -> Iterator[tuple[str, int, Callable]]:
    return diffusers(case, compiled=True)


SIDES = {
    "diffusers": diffusers,
    "diffusers compiled": diffusers_compiled,
    "ours": ours,
}

if __name__ == "__main__":
    main()
